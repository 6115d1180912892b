//! What tells two checkpoints apart without reading them whole.

use super::mapped::MappedFile;

/// Places in each file's data that are read, spread evenly from its first byte to its last, and bytes of each.
const SAMPLES: usize = 64;
const SAMPLE_LEN: usize = 64;

/// A number that stays the same for the same files, on any machine and in any version: the hash of `config.json`, if there is one, of each file's header and
/// length, and of samples of its data, so that two trainings of one architecture differ.
pub(super) fn fingerprint(config: &[u8], files: &[&MappedFile]) -> u64 {
    let mut hash = Fnv1a::new();
    hash.add(config);
    for file in files {
        let (header, data) = file.bytes().split_at(file.header_len());
        hash.add(&(file.bytes().len() as u64).to_le_bytes());
        hash.add(header);
        let last = data.len().saturating_sub(SAMPLE_LEN);
        for sample in 0..SAMPLES {
            let start = (last as u128 * sample as u128 / (SAMPLES as u128 - 1)) as usize;
            hash.add(&data[start..data.len().min(start + SAMPLE_LEN)]);
        }
    }
    hash.0
}

/// [`fingerprint`] with the time at which each file was last written: the samples can't see a change between them.
pub(super) fn stamp(fingerprint: u64, files: &[&MappedFile]) -> String {
    let written: Vec<u128> = files.iter().map(|file| file.written().map_or(0, |since| since.as_nanos())).collect();
    format!("{fingerprint:016x} written {written:?}")
}

/// FNV-1a in 64 bits: <http://www.isthe.com/chongo/tech/comp/fnv/>. The standard library's hasher may change with its version.
struct Fnv1a(u64);

impl Fnv1a {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
