//! The reader of kept weights, given bytes.

use memmap2::MmapMut;
use xxhash_rust::xxh3::xxh3_64;

use super::{Cached, QuantFormat};

/// What a header says in place of the hash of the data, which nobody hits by chance.
const HASH: &[u8] = b"$HASH";

/// What the file should be made of.
const OF: &str = "layout";

/// A file of this header and this data: whether it is one of kept weights, all of which are then taken out in many shapes.
pub(crate) fn kept_weights(header: &[u8], data: &[u8]) -> bool {
    let header = match header.windows(HASH.len()).position(|text| text == HASH) {
        Some(at) => [&header[..at], format!("{:016x}", xxh3_64(data)).as_bytes(), &header[at + HASH.len()..]].concat(),
        None => header.to_vec(),
    };
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat();
    let mut map = MmapMut::map_anon(bytes.len()).expect("memory for a small file");
    map.copy_from_slice(&bytes);
    let Some(cached) = Cached::of(map.make_read_only().expect("a map can be made read-only"), OF) else { return false };
    for name in cached.tensors.keys() {
        for (rows, cols) in [(0..0, 0..0), (0..1, 0..1), (3..20, 0..32), (0..16, 31..33), (0..usize::MAX, 0..1), (0..1 << 40, 0..1 << 40)] {
            for format in QuantFormat::ALL {
                let Some(packed) = cached.packed(name, format, &rows, &cols) else { continue };
                assert_eq!((packed.rows(), packed.cols()), (rows.len(), cols.len()));
                assert!(packed.data().len() <= data.len() && packed.data().as_ptr().addr().is_multiple_of(64));
                xxh3_64(packed.data());
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    #[test]
    fn kept_weights_that_claim_all_of_the_address_space_are_as_if_there_were_none() {
        // Eight of the most bytes whose bits can be counted, and seven more.
        const MOST: u64 = (1 << 61) - 1;
        let tensor = |i, len| json!({ "dtype": "U8", "shape": [len], "data_offsets": [i * MOST, i * MOST + len] });
        let mut header: Map<_, _> = (0..8_u64).map(|i| (format!("t{i}"), tensor(i, MOST))).collect();
        header.insert("t8".into(), tensor(8, 7));
        header.insert("__metadata__".into(), json!({ "of": OF, "xxh3": "$HASH" }));
        assert!(!kept_weights(serde_json::to_string(&header).unwrap().as_bytes(), b""));
    }

    #[test]
    fn kept_weights_are_taken_only_with_the_hash_of_their_data_and_of_what_they_should_be() {
        let header = |of: &str, hash: &str| {
            let tensor = json!({ "dtype": "U8", "shape": [576], "data_offsets": [0, 576] });
            format!("{:<184}", json!({ "w": tensor, "__metadata__": { "of": of, "xxh3": hash } }).to_string())
        };
        let taken = |header: String| kept_weights(header.as_bytes(), &[7; 576]);
        assert!(taken(header(OF, "$HASH")));
        assert!(!taken(header(OF, "0123456789abcdef")));
        assert!(!taken(header("another", "$HASH")));
    }
}
