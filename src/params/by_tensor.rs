//! [`ByTensor`]: a JSON object with a value for each tensor, as in a safetensors header and in the index of shards.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// Values by the tensor's name. Serde's own maps keep the last of equal keys; here a name that is there twice is an error.
/// The header's `__metadata__`, which isn't a tensor, is left out.
pub(super) struct ByTensor<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for ByTensor<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
    type Value = ByTensor<V>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object with a value for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<ByTensor<V>, A::Error> {
        let mut values = BTreeMap::new();
        while let Some(name) = entries.next_key::<String>()? {
            if name == "__metadata__" {
                entries.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = entries.next_value().map_err(|e| A::Error::custom(format_args!("tensor {name:?}: {e}")))?;
            if values.contains_key(&name) {
                return Err(A::Error::custom(format_args!("tensor {name:?} is there twice")));
            }
            values.insert(name, value);
        }
        Ok(ByTensor(values))
    }
}
