//! [`Config`]: the model's numbers, read from `config.json` and checked.

/// The sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Tokens in the vocabulary: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Channels of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads; query head h uses key-value head h / (n_heads / n_kv_heads).
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Added to the mean square before the root in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// The longest sequence, in positions.
    pub max_position_embeddings: usize,
    /// A position sees this many positions, itself included; `None` for all.
    pub sliding_window: Option<usize>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}
