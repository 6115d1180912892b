//! Quantised blocks as GGUF files store them: <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>.

use half::f16;

use super::format::{BLOCK, QuantFormat, SUPER, Scaling};

/// 32 columns of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stored {
    /// The values, [`QuantFormat::offset`] above what they stand for.
    pub quants: [u8; BLOCK],
    /// What the format's [`Scaling`] has of these: the scale, or what the scales are multiplied by,
    pub d: f16,
    /// what is added, or what the bytes that are subtracted are multiplied by,
    pub m: f16,
    /// and the bytes; signed ones are stored 128 too large.
    pub bytes: [u8; 2],
}

/// What stored values are worth: `scale * level`, and what is added where there is such a thing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Worth {
    /// Of the first and the second half of the columns.
    pub scales: [f32; 2],
    pub added: Option<f32>,
}

impl Stored {
    /// Part `part` of a file's block, which has 1 or 8.
    pub(super) fn read(format: QuantFormat, block: &[u8], part: usize) -> Self {
        let f16_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        let mut out = Self { quants: [0; BLOCK], d: f16_at(0), m: f16::ZERO, bytes: [0; 2] };
        let halves = |out: &mut Self, nibbles: &[u8]| {
            for (k, byte) in nibbles[..BLOCK / 2].iter().enumerate() {
                (out.quants[k], out.quants[k + BLOCK / 2]) = (byte & 15, byte >> 4);
            }
        };
        let fifth = |out: &mut Self, bits: &[u8]| {
            for (k, q) in out.quants.iter_mut().enumerate() {
                *q |= (bits[k / 8] >> (k % 8) & 1) << 4;
            }
        };
        // Of two parts that share bytes, the later one has the high nibbles.
        let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 };
        match format {
            QuantFormat::Q8_0 => out.quants = std::array::from_fn(|k| block[2 + k] ^ 0x80),
            QuantFormat::Q4_0 | QuantFormat::Iq4Nl => halves(&mut out, &block[2..]),
            QuantFormat::Q4_1 => {
                out.m = f16_at(2);
                halves(&mut out, &block[4..]);
            }
            QuantFormat::Q5_0 => {
                halves(&mut out, &block[6..]);
                fifth(&mut out, &block[2..6]);
            }
            QuantFormat::Q5_1 => {
                out.m = f16_at(2);
                halves(&mut out, &block[8..]);
                fifth(&mut out, &block[4..8]);
            }
            QuantFormat::Q4K | QuantFormat::Q5K => {
                out.m = f16_at(2);
                out.bytes = six_bits(&block[4..16], part);
                let (high, quants) = if format == QuantFormat::Q5K { (Some(&block[16..48]), &block[48..]) } else { (None, &block[16..]) };
                out.quants = std::array::from_fn(|k| {
                    let bit = high.map_or(0, |high| high[k] >> part & 1);
                    nibble(quants[part / 2 * BLOCK + k], part % 2 == 1) | bit << 4
                });
            }
            QuantFormat::Q6K => {
                out.d = f16_at(208);
                // Each half of the block is four parts that share their high bits.
                let (half, quarter) = (part / 4, part % 4);
                let (low, high) = (&block[64 * half + BLOCK * (quarter % 2)..], &block[128 + BLOCK * half..]);
                out.quants = std::array::from_fn(|k| nibble(low[k], quarter >= 2) | (high[k] >> (2 * quarter) & 3) << 4);
                out.bytes = std::array::from_fn(|half| block[192 + 2 * part + half] ^ 0x80);
            }
        }
        out
    }

    pub(super) fn worth(&self, format: QuantFormat) -> Worth {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let [first, second] = self.bytes.map(f32::from);
        match format.scaling() {
            Scaling::Plain => Worth { scales: [d; 2], added: None },
            Scaling::Affine => Worth { scales: [d; 2], added: Some(m) },
            Scaling::Super => Worth { scales: [d * first; 2], added: Some(-(m * second)) },
            Scaling::Halves => Worth { scales: [d * (first - 128.0), d * (second - 128.0)], added: None },
        }
    }

    /// The columns in f32, as ggml rounds them.
    pub(super) fn to_f32(self, format: QuantFormat) -> [f32; BLOCK] {
        let Worth { scales, added } = self.worth(format);
        std::array::from_fn(|k| {
            let product = scales[2 * k / BLOCK] * f32::from(format.level(self.quants[k]));
            added.map_or(product, |added| product + added)
        })
    }
}

/// Scale and minimum of a part, of 6 bits: those of the first four parts have a byte each, in whose upper bits are those of the others.
fn six_bits(packed: &[u8], part: usize) -> [u8; 2] {
    if part < SUPER / 2 {
        return [packed[part] & 63, packed[part + 4] & 63];
    }
    let (low, scale, minimum) = (packed[part + 4], packed[part - 4], packed[part]);
    [low & 15 | scale >> 6 << 4, low >> 4 | minimum >> 6 << 4]
}

/// Columns `at..at + out.len()` of a row of whole blocks, in f32.
pub(crate) fn row_to_f32(format: QuantFormat, row: &[u8], at: usize, out: &mut [f32]) {
    let parts = format.block() / BLOCK;
    let mut done = 0;
    while done < out.len() {
        let (b, skip) = ((at + done) / BLOCK, (at + done) % BLOCK);
        let block = &row[b / parts * format.block_bytes()..][..format.block_bytes()];
        let values = Stored::read(format, block, b % parts).to_f32(format);
        let n = (BLOCK - skip).min(out.len() - done);
        out[done..done + n].copy_from_slice(&values[skip..skip + n]);
        done += n;
    }
}
