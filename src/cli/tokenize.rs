//! `torchless tokenize`: text to tokens and back. Needs the model's tokenizer, not its weights.

use std::path::PathBuf;

use serde_json::json;
use torchless::{Parameters, Tokenizer};

use super::model::ModelArg;
use super::output::{print, print_json, table};
use super::{Failure, Outcome, files};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,

    /// The text
    #[arg(long, value_name = "TEXT", group = "what", allow_hyphen_values = true)]
    text: Option<String>,

    /// A file with the text, taken as it is, in UTF-8
    #[arg(long, value_name = "FILE", group = "what")]
    file: Option<PathBuf>,

    /// A file with a JSON array of token ids, to be turned into text
    #[arg(long, value_name = "FILE", group = "what")]
    decode: Option<PathBuf>,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let tokenizer = Parameters::load_tokenizer(args.model.tokenizer_path()?)?;
    if let Some(path) = &args.decode {
        return decode(&tokenizer, &files::read_ids(path)?, args.json);
    }
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => {
            String::from_utf8(files::read(path)?).map_err(|e| Failure::because(format!("{} is not UTF-8", path.display()), e))?
        }
        (None, None) => String::new(),
    };
    let ids = tokenizer.encode(&text)?;
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.piece(id).unwrap_or_default()).collect();
    if args.json {
        return print_json(&json!({"ids": ids, "pieces": pieces}));
    }
    let header = vec!["id".to_owned(), "piece".to_owned()];
    let rows = ids.iter().zip(pieces).map(|(id, piece)| vec![id.to_string(), piece]);
    print(&table(&std::iter::once(header).chain(rows).collect::<Vec<_>>()))
}

fn decode(tokenizer: &Tokenizer, ids: &[u32], as_json: bool) -> Outcome {
    if let Some(id) = ids.iter().find(|&&id| tokenizer.piece(id).is_none()) {
        return Err(Failure::Failed(format!("token {id} is not in the vocabulary")));
    }
    let text = tokenizer.decode(ids)?;
    if as_json { print_json(&json!({"text": text})) } else { print(&(text + "\n")) }
}
