//! [`InferenceState`]: one sequence, its tokens and where it stands.

use std::borrow::Borrow;

use crate::backend::KvType;
use crate::config::Config;
use crate::model::kv::Lease;

/// One sequence: its tokens, the logits after the last, and the cache of their keys and values.
///
/// The cache is only a cache: it is leased from a model at first use and can be rebuilt from the tokens by another model of the same
/// checkpoint. Dropping the state frees its pages.
#[derive(Debug)]
pub struct InferenceState {
    pub(crate) config: Config,
    pub(crate) kv: KvType,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) lease: Option<Lease>,
    /// The checkpoint that the tokens were computed with, once there are any.
    pub(crate) checkpoint: Option<u64>,
}

impl InferenceState {
    /// An empty sequence with an f32 cache.
    #[must_use]
    pub fn new(config: impl Borrow<Config>) -> Self {
        Self::with_kv(config, KvType::F32)
    }

    /// An empty sequence whose cache is of type `kv`.
    #[must_use]
    pub fn with_kv(config: impl Borrow<Config>, kv: KvType) -> Self {
        let config = config.borrow().clone();
        Self { config, kv, tokens: Vec::new(), logits: Vec::new(), lease: None, checkpoint: None }
    }

    /// Takes over tokens that were computed elsewhere, with what holds their keys and values. The state is empty before.
    pub(crate) fn adopt(&mut self, tokens: Vec<u32>, lease: Lease, checkpoint: u64) {
        (self.tokens, self.lease, self.checkpoint) = (tokens, Some(lease), Some(checkpoint));
    }

    /// Its tokens and what holds their keys and values, if anything does. The state is empty after.
    pub(crate) fn give_up(&mut self) -> Option<(Vec<u32>, Lease)> {
        let given = std::mem::take(&mut self.tokens);
        let lease = self.lease.take();
        self.reset();
        lease.map(|lease| (given, lease))
    }

    /// The logits after the last token: `[vocab_size]`, or empty before the first step and after [`Self::truncate`].
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The position that the next token takes: the number of tokens so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How keys and values are cached.
    #[must_use]
    pub fn kv_type(&self) -> KvType {
        self.kv
    }

    /// Pages of the KV cache held now; a page holds 64 positions in f32, 128 in f16.
    #[must_use]
    pub fn kv_pages(&self) -> usize {
        self.lease.as_ref().map_or(0, Lease::pages)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::with_kv(&self.config, self.kv);
    }

    /// Forgets all but the first `n` tokens, and the logits unless nothing is forgotten.
    pub fn truncate(&mut self, n: usize) {
        if n >= self.tokens.len() {
            return;
        }
        self.tokens.truncate(n);
        self.logits.clear();
        let seen = self.config.first_seen(n);
        if n == 0 {
            self.checkpoint = None;
        }
        if n == 0 || self.lease.as_mut().is_some_and(|lease| !lease.truncate(n, seen)) {
            self.lease = None;
        }
    }

    /// Takes back all but the first `n` tokens, the last of which `logits` come after. Those behind were a draft, so that nothing was freed that
    /// the first `n` need; what only the draft kept is freed now.
    pub(crate) fn settle(&mut self, n: usize, logits: &[f32]) {
        self.truncate(n);
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let seen = self.config.first_seen(n);
        if let Some(lease) = &mut self.lease {
            lease.commit(n, seen);
        }
    }
}
