//! The weights of a place: vectors copied, matrices where they are mapped, or packed as they are loaded.

use crate::backend::cpu::cache::{CacheFile, Cached};
use crate::backend::{Assignment, Cut, Packing};
use crate::error::{Error, Result};
use crate::kernels::product::Weights;
use crate::kernels::quant::Packed;
use crate::plan::{Weight, WeightShape};

/// A weight as a rank holds it.
pub(super) enum Held {
    Vector(Vec<f32>),
    Matrix(Weights),
}

impl Held {
    pub(super) fn vector(&self) -> &[f32] {
        let Self::Vector(v) = self else { unreachable!("the plan says which weights are vectors") };
        v
    }

    pub(super) fn matrix(&self) -> &Weights {
        let Self::Matrix(m) = self else { unreachable!("the plan says which weights are matrices") };
        m
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Vector(v) => size_of_val(&v[..]),
            Self::Matrix(m) => m.bytes(),
        }
    }
}

/// `[weight][rank]`. Called inside the place's pool, whose threads share the packing.
pub(super) fn hold(assignment: &Assignment<'_>) -> Result<Vec<Vec<Held>>> {
    let mut packer = assignment.packing.as_ref().map(|packing| Packer::new(assignment, packing));
    let held = (0..assignment.plan.weights.len())
        .map(|i| assignment.ranks.iter().map(|&rank| hold_one(assignment, Weight(i), rank, packer.as_mut())).collect())
        .collect::<Result<Vec<Vec<_>>>>()?;
    if let Some(packer) = packer {
        packer.keep();
    }
    Ok(held)
}

fn hold_one(assignment: &Assignment<'_>, weight: Weight, rank: usize, packer: Option<&mut Packer<'_>>) -> Result<Held> {
    match (assignment.plan.weights[weight.0].shape, packer) {
        (WeightShape::Vector, _) => {
            let slice = assignment.weight(weight, rank)?;
            let mut v = vec![0.0; slice.cols()];
            slice.row_to_f32(0, &mut v);
            Ok(Held::Vector(v))
        }
        (WeightShape::Matrix { .. }, None) => {
            let slice = assignment.weight(weight, rank)?;
            slice.will_need();
            Ok(Held::Matrix(Weights::Stored(slice)))
        }
        (WeightShape::Matrix { .. }, Some(packer)) => Ok(Held::Matrix(Weights::Packed(packer.pack(weight, rank)?))),
    }
}

/// Packs a place's matrices as they are loaded, or takes them from a file that an earlier load has kept.
struct Packer<'a> {
    assignment: &'a Assignment<'a>,
    packing: &'a Packing<'a>,
    file: Option<CacheFile>,
    cached: Option<Cached>,
    /// What was packed now, if it is to be kept.
    made: Vec<(String, Packed)>,
}

impl<'a> Packer<'a> {
    fn new(assignment: &'a Assignment<'a>, packing: &'a Packing<'a>) -> Self {
        let file = packing.cache.map(|(dir, source)| CacheFile::new(dir, &describe(assignment, packing, source)));
        let cached = file.as_ref().and_then(CacheFile::open);
        Self { assignment, packing, file, cached, made: Vec::new() }
    }

    fn pack(&mut self, weight: Weight, rank: usize) -> Result<Packed> {
        let Cut { whole, rows, cols } = self.assignment.cut(weight, rank)?;
        let (format, bytes) = (self.packing.format, whole.dtype().bytes(rows.len() * cols.len()));
        let name = format!("{}@{rank}", self.assignment.plan.weights[weight.0].name);
        if let Some(packed) = self.cached.as_ref().and_then(|cached| cached.packed(&name, format, &rows, &cols)) {
            (self.packing.progress)(bytes);
            return Ok(packed);
        }
        let (n, of) = (Packed::bytes_for(format, rows.len(), cols.len()), self.assignment);
        let packed = Packed::quantise(&whole, rows, cols, format, self.packing.progress).map_err(|e| Error::Device {
            stage: of.stage,
            ranks: of.ranks.clone(),
            device: "cpu".into(),
            problem: format!("no memory for the {n} bytes of {name}: {e}"),
        })?;
        // What was read of the checkpoint is not needed again.
        whole.forget();
        if self.file.is_some() {
            self.made.push((name, packed.clone()));
        }
        Ok(packed)
    }

    /// Writes the file, unless it was there. A disk that is full or read-only is no reason to fail: the weights are in memory.
    fn keep(self) {
        let Some(file) = self.file.filter(|_| !self.made.is_empty()) else { return };
        if let Err(e) = file.write(&self.made) {
            tracing::warn!("the packed weights could not be kept in {}: {e}", file.path().display());
        }
    }
}

/// All that the bytes of a place's packed weights depend on.
fn describe(assignment: &Assignment<'_>, packing: &Packing<'_>, source: &str) -> String {
    let ranks: Vec<_> = assignment.ranks.iter().map(|&rank| (rank, &assignment.partition.ranks[rank])).collect();
    format!("{} of {source}, layers {:?}, ranks {ranks:?}", packing.format.name(), assignment.partition.layers)
}
