//! [`zeroed`]: large memory for what is read from end to end again and again.

use memmap2::MmapMut;

/// So many bytes of zeros, in huge pages where the system has them to give: reading gets faster with fewer addresses to translate.
///
/// # Errors
/// If there is no memory.
pub(crate) fn zeroed(bytes: usize) -> std::io::Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes.max(1))?;
    // Advice is no more than that.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}

/// [`zeroed`] memory as words.
pub(crate) struct Words(MmapMut);

impl Words {
    /// # Errors
    /// If there is no memory.
    pub(crate) fn zeroed(words: usize) -> std::io::Result<Self> {
        zeroed(size_of::<u32>() * words).map(Self)
    }
}

impl std::ops::Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // A byte of nothing, where there are no words, is none.
        bytemuck::cast_slice(&self.0[..self.0.len() / size_of::<u32>() * size_of::<u32>()])
    }
}

impl std::ops::DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        let whole = self.0.len() / size_of::<u32>() * size_of::<u32>();
        bytemuck::cast_slice_mut(&mut self.0[..whole])
    }
}
