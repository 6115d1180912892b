//! [`Bytes`]: a place in a GGUF file, from which its fields are read one behind the other.

/// Most bytes of a name that a message quotes.
const QUOTED: usize = 80;

pub(super) struct Bytes<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    /// `at` must lie in the file.
    pub(super) fn new(file: &'a [u8], at: usize) -> Self {
        Self { file, at }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn left(&self) -> usize {
        self.file.len() - self.at
    }

    /// The next `n` bytes. What is missing, if not all of them are there.
    pub(super) fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let left = self.left();
        let n = usize::try_from(n)
            .ok()
            .filter(|n| *n <= left)
            .ok_or_else(|| format!("{n} bytes are wanted from byte {} on, and {left} follow before the file ends", self.at))?;
        let taken = &self.file[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N as u64).map(|bytes| std::array::from_fn(|i| bytes[i]))
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string with its length in front, whatever its bytes.
    pub(super) fn string(&mut self) -> Result<&'a [u8], String> {
        let len = self.u64()?;
        self.take(len)
    }

    /// The name of a tensor or a key, of at most `longest` bytes.
    pub(super) fn name(&mut self, longest: usize) -> Result<&'a str, String> {
        let bytes = self.string()?;
        if bytes.len() > longest {
            return Err(format!("its name has {} bytes; {longest} are the most", bytes.len()));
        }
        std::str::from_utf8(bytes).map_err(|_| format!("its name is not UTF-8: {}", quoted(&String::from_utf8_lossy(bytes))))
    }

    /// How many entries follow, each of at least `least` bytes: no more than the file has room for.
    pub(super) fn count(&self, n: u64, least: usize, of: &str) -> Result<(), String> {
        let room = self.left() / least;
        if n > room as u64 {
            return Err(format!("it claims {n} {of}, and the {} bytes that follow have room for {room} at most", self.left()));
        }
        Ok(())
    }
}

/// A text in quotes, cut where it grows too long for a message.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{:?}..", &text[..end]),
        None => format!("{text:?}"),
    }
}
