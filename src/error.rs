//! Every way torchless can fail, as one type.

use std::path::PathBuf;

/// Shorthand used by the whole crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what would be right.
///
/// Messages are complete sentences with the numbers in them, fit to be shown as they are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read, mapped or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },

    /// `config.json`, `generation_config.json`, the shard index or the metadata of a GGUF file is damaged or contradicts itself, or the
    /// directory holds no model, or more than one.
    #[error("{}: {problem}", path.display())]
    Config { path: PathBuf, problem: String },

    /// A feature of the checkpoint that torchless does not compute.
    #[error("{what} {found:?} is not supported; torchless supports {supported}")]
    Unsupported { what: &'static str, found: String, supported: &'static str },

    /// A file of tensors, of this kind (`safetensors` or `GGUF`), is damaged.
    #[error("{} is not a sound {kind} file: {problem}", path.display())]
    Checkpoint { path: PathBuf, kind: &'static str, problem: String },

    /// A tensor is missing, has the wrong shape or dtype, or doesn't lie at a multiple of its element's size.
    #[error("tensor {name:?} {problem}")]
    Tensor { name: String, problem: String },

    /// `tokenizer.json` is missing or damaged, or text could not be encoded or decoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// A chat template is missing, damaged, refuses the messages or takes too much.
    #[error("chat template: {0}")]
    ChatTemplate(String),

    /// A matrix was built from the wrong number of values.
    #[error("a matrix of {rows} x {cols} cannot be made of {found} values")]
    MatrixSize { rows: usize, cols: usize, found: usize },

    /// A group of no ranks.
    #[error("the world size is 0; at least 1 rank is needed")]
    NoRanks,

    /// A rank outside its world.
    #[error("rank {rank} does not exist in a world of {world_size}: ranks are 0 to {}", world_size.saturating_sub(1))]
    RankOutOfRange { rank: usize, world_size: usize },

    /// More ranks than query heads: some rank would have no attention to compute.
    #[error("{world_size} ranks cannot share {n_heads} query heads; use at most {n_heads} ranks")]
    TooManyRanks { world_size: usize, n_heads: usize },

    /// A number of stages that the layers can't fill, or that doesn't divide the device list.
    #[error("{stages} stages cannot share {what}; {right}")]
    Stages { stages: usize, what: String, right: String },

    /// Shares that are not one finite positive number a rank of a stage, nor one a device of the grid.
    #[error("shares {shares:?} do not fit {world_size} ranks{}", wanted_shares(*stages, *world_size))]
    Shares { shares: Vec<f64>, stages: usize, world_size: usize },

    /// A prompt without tokens.
    #[error("the prompt is empty; at least one token is needed")]
    EmptyPrompt,

    /// A batch with another number of tokens than of sequences.
    #[error("a batch of {states} sequences was given {tokens} tokens; each sequence takes one")]
    BatchSize { states: usize, tokens: usize },

    /// A token that the vocabulary doesn't have.
    #[error("token {token} does not exist: the vocabulary has {vocab_size} tokens, 0 to {}", vocab_size.saturating_sub(1))]
    TokenOutOfRange { token: u32, vocab_size: usize },

    /// The sequence would grow past `max_position_embeddings`.
    #[error("{wanted} more tokens after position {position} do not fit the model's context of {limit}")]
    ContextFull { position: usize, wanted: usize, limit: usize },

    /// The KV cache has no room.
    #[error("the KV cache is full: {wanted} more pages of {page_len} positions are needed, {free} of {total} are free")]
    CacheFull { wanted: usize, free: usize, total: usize, page_len: usize },

    /// A state of another checkpoint, or of another configuration.
    #[error("this inference state belongs to another checkpoint: {0}")]
    ForeignState(String),

    /// An option with a value that makes no sense.
    #[error("{option} {value} makes no sense: {right}")]
    Option { option: &'static str, value: String, right: &'static str },

    /// A file that was taken for a trace.
    #[error("{name} is no trace that can be drawn: {problem}")]
    Trace { name: String, problem: String },

    /// An empty device list.
    #[error("the device list is empty; name at least one device, such as \"cpu\"")]
    NoDevices,

    /// A device that this machine doesn't have.
    #[error("there is no device {name:?}: {right}")]
    NoSuchDevice { name: String, right: String },

    /// A device could not be opened, or refused work that it should take.
    #[error("{device} (stage {stage}, ranks {ranks:?}): {problem}")]
    Device { stage: usize, ranks: Vec<usize>, device: String, problem: String },

    /// A device disappeared: unplugged, reset, or its driver gave up.
    #[error("{device} was lost (stage {stage}, ranks {ranks:?}): {reason}")]
    DeviceLost { stage: usize, ranks: Vec<usize>, device: String, reason: String },

    /// The weights that a device should hold are more than its memory, known before the first is read.
    #[error(
        "{device} has {memory} bytes of memory, and the weights that it should hold take {wanted}: {} are missing; a smaller share, more devices \
         or quantised weights would help, {}% of these weights would fit",
        wanted - memory, 100 * memory / wanted
    )]
    TooLittleMemory { device: String, memory: u64, wanted: u64 },

    /// A device has too little memory for its share of the model.
    #[error("{device} (stage {stage}, ranks {ranks:?}) is out of memory: {wanted} bytes for {what} could not be had")]
    OutOfMemory { stage: usize, ranks: Vec<usize>, device: String, what: String, wanted: u64 },

    /// A model of the hub that cannot be had: there is none, it is refused, or what comes is not what it should be.
    #[error("the model {model} of the Hugging Face hub cannot be fetched: {problem}")]
    Hub { model: String, problem: String },

    /// The hub doesn't answer, or must not be asked, and the model isn't in the cache.
    #[error(
        "the model {model} of the Hugging Face hub is not in the cache, and {endpoint} cannot be reached: {problem}; the path of a local copy needs no network"
    )]
    HubUnreachable { model: String, endpoint: String, problem: String },

    /// The processes of a group disagree or cannot talk.
    #[error("the group of processes cannot go on: {0}")]
    Collective(String),

    /// A request that was handed in ended early.
    #[error("the request ended early: {0}")]
    Request(String),

    /// The thread that drives the model ended early; the model must be loaded again.
    #[error("the model's driver thread has ended: {0}")]
    DriverGone(String),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn config(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Config { path: path.into(), problem: problem.into() }
    }

    pub(crate) fn hub(model: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Hub { model: model.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), problem: problem.into() }
    }
}

/// The rest of a sentence that begins with the ranks of a stage: how many shares would fit.
fn wanted_shares(stages: usize, ranks: usize) -> String {
    let numbers = "finite numbers above 0";
    match stages {
        1 => format!(": give {ranks} {numbers}, one a rank"),
        _ => {
            let all = stages.saturating_mul(ranks);
            format!(
                " in each of {stages} stages: give {ranks} {numbers}, one a rank of every stage, or {all}, one a device, stage after stage"
            )
        }
    }
}
