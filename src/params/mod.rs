//! [`Parameters`]: a checkpoint, mapped and checked.

mod by_tensor;
mod chat;
mod files;
mod fingerprint;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzed;
mod generation;
mod gguf;
mod mapped;
mod safetensors;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::chat::ChatTemplate;
use crate::config::{CONFIG_LIMIT, Config, Keys, read_at_most};
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::tokenizer::Tokenizer;
#[cfg(feature = "hub")]
pub(crate) use files::shards_of;
pub use generation::GenerationConfig;
#[cfg(feature = "hub")]
pub(crate) use gguf::PartName;
use gguf::{GgufModel, Metadata};
use mapped::MappedFile;
pub(crate) use safetensors::read_header;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A checkpoint in a Hugging Face directory or in GGUF files: its sizes, and its tensors where they lie in the mapped files.
///
/// Cloning copies nothing, and all clones share the maps.
#[derive(Clone)]
pub struct Parameters(Arc<Checkpoint>);

struct Checkpoint {
    path: PathBuf,
    config: Config,
    generation: GenerationConfig,
    /// Every tensor of the model, and no other; a vector is a matrix of one row.
    tensors: HashMap<String, Matrix>,
    fingerprint: u64,
    stamp: String,
    /// Of a GGUF file: what it says of text, among others.
    metadata: Option<Metadata>,
    /// Read when text is first needed.
    tokenizer: OnceLock<Tokenizer>,
}

impl Checkpoint {
    fn in_directory(dir: &Path) -> Result<Self> {
        // Fails on what isn't a directory, by the right name.
        fs::read_dir(dir).map_err(Error::io("open", dir))?;
        let config_path = dir.join("config.json");
        let json = read_at_most(&config_path, CONFIG_LIMIT)?;
        let config = Config::from_json(&json, &config_path)?;
        let generation = GenerationConfig::load(dir, &Keys::parse(&json, &config_path)?)?;

        let files = files::open_all(dir)?;
        let (mut tensors, optional) = (HashMap::new(), config.optional_weights());
        // One by one: a config may claim any number of layers, and the first that is missing must end this.
        for (name, shape) in tensors_of(&config) {
            let file = files.iter().find(|file| file.has(&name));
            let file = file.ok_or_else(|| Error::tensor(&name, format!("is missing from the checkpoint in {}", dir.display())))?;
            let bias = name.replace(".weight", ".bias");
            let known = || optional.iter().any(|(name, _)| bias.ends_with(name));
            if files.iter().any(|file| file.has(&bias)) && !known() {
                return Err(Error::Unsupported { what: "tensor", found: bias, supported: "layers without biases, but for Qwen 2's" });
            }
            let matrix = file.matrix(&name, &shape)?;
            tensors.insert(name, matrix);
        }
        let files: Vec<&MappedFile> = files.iter().map(safetensors::SafetensorsFile::file).collect();
        let fingerprint = fingerprint::fingerprint(&json, &files);
        let stamp = fingerprint::stamp(fingerprint, &files);
        let tokenizer = OnceLock::new();
        Ok(Self { path: dir.into(), config, generation, tensors, fingerprint, stamp, metadata: None, tokenizer })
    }

    /// The model of which `file` is the file or a part, where the caller named `path`.
    fn in_gguf(path: &Path, file: &Path) -> Result<Self> {
        let model = GgufModel::open(file)?;
        let tensors = model.tensors()?;
        let files = model.files();
        // The metadata is in the header.
        let fingerprint = fingerprint::fingerprint(&[], &files);
        let stamp = fingerprint::stamp(fingerprint, &files);
        let (metadata, tokenizer) = (Some(model.metadata().clone()), OnceLock::new());
        let GgufModel { config, generation, .. } = model;
        Ok(Self { path: path.into(), config, generation, tensors, fingerprint, stamp, metadata, tokenizer })
    }
}

impl Parameters {
    /// Opens a checkpoint: a Hugging Face directory, or GGUF files.
    ///
    /// A directory has `config.json`, `model.safetensors` or its shards, and `generation_config.json` if it is there. A GGUF model is named by
    /// its file, by any part of a split set, or by a directory that holds it and no other model; it must be of architecture `llama`,
    /// which is Mistral's too, `qwen2` or `qwen3`, and its tensors get the names and the order that they have in Hugging Face checkpoints.
    ///
    /// Every tensor that the model needs is checked before this returns, and none is read: the files are mapped.
    /// While any clone lives, the files must not be changed: reading a mapped file that was cut short ends the process (SIGBUS).
    /// Infinities and NaN among the weights, or among the scales of quantised ones, are not looked for.
    ///
    /// # Errors
    /// [`Error::Io`]; those of [`Config::load`], also for the metadata of a GGUF file; [`Error::Checkpoint`] if a file is damaged;
    /// [`Error::Config`] if a part is missing, or there are several GGUF models; [`Error::Tensor`] if a tensor is missing, or isn't what the
    /// sizes make it; [`Error::Unsupported`] if a layer has biases.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let checkpoint = match gguf::named_by(path)? {
            Some(file) => Checkpoint::in_gguf(path, &file)?,
            None if path.is_file() => return Err(neither(path)),
            None => Checkpoint::in_directory(path)?,
        };
        Ok(Self(Arc::new(checkpoint)))
    }

    /// The model's sizes and constants.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The tokens that begin and end a text.
    #[must_use]
    pub fn generation(&self) -> &GenerationConfig {
        &self.0.generation
    }

    /// The tokenizer, read at the first call: a checkpoint without one loads too.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`]; of a GGUF file, [`Error::Config`] if it has no vocabulary, [`Error::Tokenizer`] or [`Error::Unsupported`] if
    /// that is none that can be used.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        if let Some(tokenizer) = self.0.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = match &self.0.metadata {
            Some(metadata) => Tokenizer::from_vocabulary(metadata.vocabulary()?)?,
            None => Tokenizer::from_dir(&self.0.path)?,
        };
        Ok(self.0.tokenizer.get_or_init(|| tokenizer))
    }

    /// The tokenizer of the model at a path that [`Self::load`] takes, whose weights need not be there.
    ///
    /// # Errors
    /// As [`Self::tokenizer`], and those of [`Self::load`] for the file that says it.
    pub fn load_tokenizer(path: impl AsRef<Path>) -> Result<Tokenizer> {
        match gguf::named_by(path.as_ref())? {
            Some(file) => Tokenizer::from_vocabulary(gguf::vocabulary(&file)?),
            None if path.as_ref().is_file() => Err(neither(path.as_ref())),
            None => Tokenizer::from_dir(path),
        }
    }

    /// The model's chat template, read at every call: `chat_template.jinja`, or what `tokenizer_config.json` has, or a GGUF file's metadata.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if there is none, and those of [`ChatTemplate::new`]; [`Error::Io`] and [`Error::Config`] for the files.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let Some(metadata) = &self.0.metadata else { return chat::load(&self.0.path) };
        let Some(source) = metadata.chat_template()? else {
            let problem = format!("{} has none: no tokenizer.chat_template is among its metadata", self.0.path.display());
            return Err(Error::ChatTemplate(problem));
        };
        ChatTemplate::new(source, &metadata.bos()?, &metadata.eos()?)
    }

    /// The directory or file that was loaded.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The directory in which the files lie.
    pub(crate) fn directory(&self) -> &Path {
        let path = self.path();
        if path.is_file() { path.parent().unwrap_or(path) } else { path }
    }

    /// A whole tensor of the model by its name in Hugging Face checkpoints: `[out_features, in_features]`; a vector is a matrix of one row.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the model has no tensor of that name.
    pub fn tensor(&self, name: &str) -> Result<Matrix> {
        let matrix = self.0.tensors.get(name).cloned();
        matrix.ok_or_else(|| Error::tensor(name, format!("is not part of the model in {}", self.0.path.display())))
    }

    /// The same model with its first `n` layers only, to measure with.
    pub(crate) fn first_layers(&self, n: usize) -> Self {
        let Checkpoint { path, config, generation, tensors, fingerprint, stamp, metadata, .. } = &*self.0;
        let config = Config { n_layers: n, ..config.clone() };
        let tensors = tensors_of(&config).filter_map(|(name, _)| tensors.get(&name).cloned().map(|matrix| (name, matrix))).collect();
        Self(Arc::new(Checkpoint {
            path: path.clone(),
            config,
            generation: generation.clone(),
            tensors,
            fingerprint: fingerprint ^ n as u64,
            stamp: stamp.clone(),
            metadata: metadata.clone(),
            tokenizer: OnceLock::new(),
        }))
    }

    /// Bytes of all tensors of the model, as they are stored.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.tensors.values().map(|matrix| matrix.bytes() as u64).sum()
    }

    /// Whether any of its matrices is stored in a quantised format.
    pub(crate) fn is_quantised(&self) -> bool {
        self.0.tensors.values().any(|matrix| matrix.dtype().quantised().is_some())
    }

    /// A number that stays the same for a checkpoint wherever it lies, and differs for another one.
    ///
    /// It is a hash of the config or metadata, of all headers and of a few KiB of samples of each file's data: no proof against a forgery.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.0.fingerprint
    }

    /// What tells whether what was once made of the checkpoint still holds: also changes where a file was written anew.
    pub(crate) fn stamp(&self) -> String {
        self.0.stamp.clone()
    }

    /// A row for each token: `[vocab_size, hidden_size]`.
    pub(crate) fn embedding(&self) -> Matrix {
        self.0.tensors[EMBEDDING].clone()
    }
}

fn neither(path: &Path) -> Error {
    Error::config(path, "it is neither the directory of a model nor a GGUF file")
}

impl std::fmt::Debug for Parameters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parameters").field("path", &self.0.path).field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// Every tensor of a model with these sizes, with its shape, as transformers names them.
fn tensors_of(config: &Config) -> impl Iterator<Item = (String, Vec<usize>)> {
    let (hidden, channels, q, kv) = (config.hidden_size, config.intermediate_size, config.q_dim(), config.kv_dim());
    let embedding = vec![config.vocab_size, hidden];
    let ends = [(EMBEDDING, embedding.clone()), ("model.norm.weight", vec![hidden])];
    let head = (!config.tie_word_embeddings).then_some((HEAD, embedding));
    let layer = [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![q, hidden]),
        ("self_attn.k_proj", vec![kv, hidden]),
        ("self_attn.v_proj", vec![kv, hidden]),
        ("self_attn.o_proj", vec![hidden, q]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![channels, hidden]),
        ("mlp.up_proj", vec![channels, hidden]),
        ("mlp.down_proj", vec![hidden, channels]),
    ];
    let mut layer: Vec<_> = layer.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape)).collect();
    layer.extend(config.optional_weights().into_iter().map(|(name, elements)| (name.to_owned(), vec![elements])));
    let layers = (0..config.n_layers)
        .flat_map(move |i| layer.clone().into_iter().map(move |(name, shape)| (format!("model.layers.{i}.{name}"), shape)));
    ends.into_iter().chain(head).map(|(name, shape)| (name.to_owned(), shape)).chain(layers)
}
