//! [`Packer`]: a place's matrices, quantised as they are loaded or laid out anew.

mod cache;
#[cfg(any(fuzzing, test))]
pub(crate) use cache::fuzzed;

use crate::backend::{Assignment, Cut, Packing};
use crate::error::{Error, Result};
use crate::kernels::quant::{Packed, QuantFormat};
use crate::plan::Weight;
use cache::{CacheFile, Cached};

/// Packs a place's matrices as they are loaded, or takes them from a file that an earlier load has kept.
pub(super) struct Packer<'a> {
    assignment: &'a Assignment<'a>,
    /// For messages.
    device: &'a str,
    packing: &'a Packing<'a>,
    file: Option<CacheFile>,
    cached: Option<Cached>,
    /// What was packed now, if it is to be kept.
    made: Vec<(String, Packed)>,
}

impl<'a> Packer<'a> {
    pub(super) fn new(assignment: &'a Assignment<'a>, packing: &'a Packing<'a>, device: &'a str) -> Self {
        let file = packing.cache.map(|(dir, source)| CacheFile::new(dir, &describe(assignment, packing, source)));
        let cached = file.as_ref().and_then(CacheFile::open);
        Self { assignment, device, packing, file, cached, made: Vec::new() }
    }

    /// Rank `rank`'s slice of a matrix, unless it is to be left as it is stored. Called inside a pool, whose threads share the work.
    pub(super) fn pack(&mut self, weight: Weight, rank: usize) -> Result<Option<Packed>> {
        let Cut { whole, rows, cols } = self.assignment.cut(weight, rank)?;
        let bytes = rows.len() * whole.dtype().bytes(cols.len());
        let Some(format) = self.packing.format_of(&whole) else {
            (self.packing.progress)(bytes);
            return Ok(None);
        };
        let name = format!("{}@{rank}", self.assignment.plan.weights[weight.0].name);
        if let Some(packed) = self.cached.as_ref().and_then(|cached| cached.packed(&name, format, &rows, &cols)) {
            (self.packing.progress)(bytes);
            return Ok(Some(packed));
        }
        let (n, of) = (Packed::bytes_for(format, rows.len(), cols.len(), cols.start), self.assignment);
        let packed = Packed::quantise(&whole, rows, cols, format, self.packing.progress).map_err(|e| Error::Device {
            stage: of.stage,
            ranks: of.ranks.clone(),
            device: self.device.into(),
            problem: format!("no memory for the {n} bytes of {name}: {e}"),
        })?;
        // What was read of the checkpoint is not needed again.
        whole.forget();
        if self.file.is_some() {
            self.made.push((name, packed.clone()));
        }
        Ok(Some(packed))
    }

    /// Writes the file, unless it was there. A disk that is full or read-only is no reason to fail: the weights are in memory.
    pub(super) fn keep(self) {
        let Some(file) = self.file.filter(|_| !self.made.is_empty()) else { return };
        if let Err(e) = file.write(&self.made) {
            tracing::warn!("the packed weights could not be kept in {}: {e}", file.path().display());
        }
    }
}

/// All that the bytes of a place's packed weights depend on.
fn describe(assignment: &Assignment<'_>, packing: &Packing<'_>, source: &str) -> String {
    let ranks: Vec<_> = assignment.ranks.iter().map(|&rank| (rank, &assignment.partition.ranks[rank])).collect();
    let format = packing.format.map_or("stored", QuantFormat::name);
    format!("{format} of {source}, layers {:?}, ranks {ranks:?}", assignment.partition.layers)
}
