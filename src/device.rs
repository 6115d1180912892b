//! [`Device`]: what a rank can live on.

/// The CPU.
#[derive(Debug, Clone)]
pub struct Device {
    isolated: bool,
}

impl Device {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self { isolated: false }
    }
    /// A place of its own.
    #[must_use]
    pub fn isolated(self) -> Self {
        Self { isolated: true }
    }
    pub(crate) fn label(&self) -> String {
        "cpu".into()
    }
    pub(crate) fn is_cpu(&self) -> bool {
        true
    }
    pub(crate) fn shares_place_with(&self, other: &Self) -> bool {
        !self.isolated && !other.isolated
    }
}
