//! The weights of a place: vectors copied, matrices where they are mapped, or packed as they are loaded.

use crate::backend::Assignment;
use crate::backend::packer::Packer;
use crate::error::Result;
use crate::kernels::product::Weights;
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
    let mut packer = assignment.packing.as_ref().map(|packing| Packer::new(assignment, packing, "cpu"));
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
        (WeightShape::Vector | WeightShape::Bias { .. }, _) => {
            let slice = assignment.weight(weight, rank)?;
            let mut v = vec![0.0; slice.cols()];
            slice.row_to_f32(0, &mut v);
            Ok(Held::Vector(v))
        }
        (WeightShape::Matrix { .. }, packer) => {
            let packed = packer.map(|packer| packer.pack(weight, rank)).transpose()?.flatten();
            let stored = || {
                let slice = assignment.weight(weight, rank)?;
                slice.will_need();
                Ok(Weights::Stored(slice))
            };
            packed.map_or_else(stored, |packed| Ok(Weights::Packed(packed))).map(Held::Matrix)
        }
    }
}
