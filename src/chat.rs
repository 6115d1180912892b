//! [`ChatTemplate`]: from the messages of a conversation to the text that a model was trained to go on from.

mod form;
mod sandbox;

use serde::Serialize;

use crate::error::Result;
use sandbox::Sandbox;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// Who says it: `system`, `user` or `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// What the model is told in front of everything.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// What the model has answered.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".into(), content: content.into() }
    }
}

/// A model's own Jinja template, which makes one text of a conversation as transformers' `apply_chat_template` does.
///
/// Encode the text with [`Tokenizer::encode_continuation`](crate::Tokenizer::encode_continuation): templates write their own special
/// tokens, and what they write is taken as such. So is what a message spells: whoever writes `<|im_end|>` into a message ends it there.
///
/// A template is a program from a stranger. It reaches no file and no network; its source (256 KiB), its steps, its values and its text (16 MiB) are
/// bounded, and its clock runs out after five seconds, at the next round, method or name. What would go around that is refused by name when the
/// template is read: `include` and its like, recursive loops, products other than of a text in quotes, and tags of more than 1000 tokens.
///
/// ```
/// use torchless::{ChatMessage, ChatTemplate};
///
/// let source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
/// let template = ChatTemplate::new(source, "<s>", "</s>")?;
/// assert_eq!(template.render(&[ChatMessage::user("Hello!")], true)?, "[user] Hello!</s>[assistant]");
/// # Ok::<(), torchless::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    sandbox: Sandbox,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Reads a template's source. `bos` and `eos` are the texts of the tokens that begin and end a text, empty where a model has none.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`](crate::Error::ChatTemplate) with the line, if the source is no template or could not be bounded.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        Ok(Self { sandbox: Sandbox::new(source)?, bos: bos.into(), eos: eos.into() })
    }

    /// The text of a conversation; with `add_generation_prompt`, up to where the model's answer begins.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`](crate::Error::ChatTemplate) with the line, if the template refuses the messages, has a fault or takes too much.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.sandbox.render(messages, add_generation_prompt, [&self.bos, &self.eos])
    }

    /// The text of the token that ends an answer, empty where there is none.
    #[must_use]
    pub fn eos(&self) -> &str {
        &self.eos
    }
}

#[cfg(test)]
mod tests;
