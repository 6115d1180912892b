//! Where everything will be: the ranks of a grid on devices, known before anything is loaded.

use std::ops::Range;
use std::path::Path;

use crate::backend::{Assignment, BLOCK, Packing, Room, Wire};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::kernels::quant::QuantFormat;
use crate::model::grid::room;
use crate::model::mistral;
use crate::model::parallel_config::ParallelConfig;
use crate::params::Parameters;
use crate::partition::{Dim, Partition, RankPartition};
use crate::plan::{Plan, Rows};

/// One rank of a loaded (or planned) grid: where it is and what it owns.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RankInfo {
    /// Its stage.
    pub stage: usize,
    /// Its number within the stage.
    pub rank: usize,
    /// The device that it is on.
    pub device: String,
    /// The layers of its stage.
    pub layers: Range<usize>,
    /// Its part of each.
    pub partition: RankPartition,
    /// Bytes of its weights as stored.
    pub weight_bytes: u64,
}

/// What a grid will do, known before anything is loaded.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PlanSummary {
    /// Every rank of every stage.
    pub ranks: Vec<RankInfo>,
    /// Ops of the plan that compute one token.
    pub ops_per_token: usize,
    /// Segments launched for one token, over all places.
    pub submissions_per_token: usize,
    /// All-reduces and gathers through the host for one token.
    pub collectives_per_token: usize,
    /// Bytes of weights read for one token, by all ranks together.
    pub weight_bytes_per_token: u64,
    /// What every device will hold, in the order in which they are first named.
    pub memory: Vec<DeviceMemory>,
}

/// The memory that a grid takes of a device, in bytes. It fits: a plan that doesn't is an error.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeviceMemory {
    /// Its label.
    pub device: String,
    /// Weights, as they are held; those that the CPU computes with as they are stored stay in the mapped files.
    pub weights: u64,
    /// Keys and values, when the cache is full.
    pub cache: u64,
    /// Activations of the largest batch.
    pub workspace: u64,
    /// What the device has, if its API tells.
    pub has: Option<u64>,
}

/// What the devices of a grid will hold.
fn memory(params: &Parameters, partition: &Partition, layouts: &[Layout], ranks: &[RankInfo], room: Room) -> Vec<DeviceMemory> {
    let mut all: Vec<DeviceMemory> = Vec::new();
    for (stage, layout) in layouts.iter().enumerate() {
        for (device, hosted) in &layout.groups {
            let of = |bytes: &dyn Fn(&RankPartition) -> usize| {
                hosted.iter().map(|&rank| bytes(&partition.stages[stage].ranks[rank]) as u64).sum::<u64>()
            };
            let page = |rank: &RankPartition| 2 * layout.plan.layers * BLOCK * size_of::<f32>() * rank.width(Dim::KvHeads, params.config());
            let rows = |rows| if rows == Rows::All { room.rows } else { room.wanted };
            let row =
                |rank: &RankPartition| layout.plan.bufs.iter().map(|buf| 4 * rows(buf.rows) * rank.width(buf.dim, params.config())).sum();
            let at = all.iter().position(|memory| memory.device == device.label()).unwrap_or_else(|| {
                let weights = ranks.iter().filter(|rank| rank.device == device.label()).map(|rank| rank.weight_bytes).sum();
                all.push(DeviceMemory { device: device.label(), weights, cache: 0, workspace: 0, has: device.memory() });
                all.len() - 1
            });
            all[at].cache = all[at].cache.saturating_add((room.pages as u64).saturating_mul(of(&page)));
            all[at].workspace += of(&row);
        }
    }
    all
}

/// Batches that overlap: one computes while the other is summed.
pub(super) const LANES: usize = 2;

/// A stage as it will be: its plan, and which ranks live together.
pub(super) struct Layout {
    pub plan: Plan,
    /// A place each: its device and its ranks.
    pub groups: Vec<(Device, Vec<usize>)>,
    /// Whether the next stage lives on this one's only device, with all its ranks.
    pub stays: bool,
    /// Batches that are on their way in each of its places at once, the same in all stages.
    pub lanes: usize,
    /// How sums of many rows travel between its places.
    pub wire: Wire,
}

/// Lays a model out over devices: `devices` are those of `local` ranks, stage after stage.
pub(super) fn lay_out(
    params: &Parameters,
    config: &ParallelConfig,
    partition: &Partition,
    local: &[usize],
    devices: &[Device],
    group_size: usize,
) -> Vec<Layout> {
    let by_stage = devices.chunks(local.len());
    let mut layouts: Vec<Layout> = partition
        .stages
        .iter()
        .zip(by_stage)
        .map(|(stage, devices)| {
            let mut groups: Vec<(Device, Vec<usize>)> = Vec::new();
            for (&rank, device) in local.iter().zip(devices) {
                match groups.iter_mut().find(|(d, _)| d.shares_place_with(device)) {
                    Some((_, ranks)) => ranks.push(rank),
                    None => groups.push((device.clone(), vec![rank])),
                }
            }
            let cut = groups.len() > 1 || group_size > 1;
            Layout { plan: mistral::record(params.config(), stage.layers.clone(), cut), groups, stays: false, lanes: 1, wire: config.wire }
        })
        .collect();
    // While one batch is summed, places that compute on their own go on with another.
    let meets_others = |layout: &Layout| layout.groups.len() > 1 || group_size > 1;
    let overlaps = |layout: &Layout| meets_others(layout) && layout.groups.iter().any(|(device, _)| !device.is_cpu());
    if config.overlap && layouts.iter().any(overlaps) {
        overlap(&mut layouts);
    }
    for stage in 1..layouts.len() {
        if let ([(this, _)], [(next, _)]) = (&layouts[stage - 1].groups[..], &layouts[stage].groups[..]) {
            layouts[stage - 1].stays = this.shares_place_with(next);
        }
    }
    layouts
}

/// Lets batches overlap in all stages.
pub(super) fn overlap(layouts: &mut [Layout]) {
    layouts.iter_mut().for_each(|layout| layout.lanes = LANES);
}

impl Layout {
    /// Every place with what it is made of.
    pub(super) fn assignments<'a>(
        &'a self,
        stage: usize,
        params: &'a Parameters,
        partition: &'a Partition,
        tensor: &'a (dyn Fn(&str) -> Result<Matrix> + Sync),
        tune: bool,
        packing: Option<Packing<'a>>,
    ) -> impl Iterator<Item = (&'a Device, Assignment<'a>)> {
        self.groups.iter().map(move |(device, ranks)| {
            let (plan, config, partition) = (&self.plan, params.config(), &partition.stages[stage]);
            (
                device,
                Assignment {
                    stage,
                    stays: self.stays,
                    spare: None,
                    lanes: self.lanes,
                    wire: self.wire,
                    tune,
                    ranks: ranks.clone(),
                    plan,
                    config,
                    partition,
                    tensor,
                    packing,
                },
            )
        })
    }
}

/// Every rank with the bytes of its weights, read off the checkpoint's headers.
pub(super) fn rank_infos(
    params: &Parameters,
    partition: &Partition,
    layouts: &[Layout],
    packing: Option<Packing<'_>>,
) -> Result<Vec<RankInfo>> {
    let tensor = |name: &str| params.tensor(name);
    let mut infos = Vec::new();
    for (stage, layout) in layouts.iter().enumerate() {
        for (device, assignment) in layout.assignments(stage, params, partition, &tensor, false, packing) {
            for &rank in &assignment.ranks {
                let weights = (0..layout.plan.weights.len()).map(|i| assignment.bytes(crate::plan::Weight(i), rank));
                let weight_bytes = weights.map(|bytes| bytes.map(|bytes| bytes as u64)).sum::<Result<u64>>()?;
                let (layers, partition) = (assignment.partition.layers.clone(), assignment.partition.ranks[rank].clone());
                infos.push(RankInfo { stage, rank, device: device.label(), layers, partition, weight_bytes });
            }
        }
    }
    infos.sort_by_key(|info| (info.stage, info.rank));
    Ok(infos)
}

/// Bytes that a device has for the cache and activations of each of its places, beside all weights that it will hold; `None` if nobody knows.
///
/// # Errors
/// [`Error::TooLittleMemory`] if it can't even hold the weights.
pub(super) fn spare(device: &Device, ranks: &[RankInfo], layouts: &[Layout]) -> Result<Option<u64>> {
    let Some(memory) = device.memory() else { return Ok(None) };
    let wanted = ranks.iter().filter(|rank| rank.device == device.label()).map(|rank| rank.weight_bytes).sum();
    let places = layouts.iter().flat_map(|layout| &layout.groups).filter(|(other, _)| other.label() == device.label()).count();
    let spare = memory.checked_sub(wanted).ok_or_else(|| Error::TooLittleMemory { device: device.to_string(), memory, wanted })?;
    Ok(Some(spare / places.max(1) as u64))
}

/// How matrices are packed, if any is: because the checkpoint has quantised ones, or because `config` wants that.
///
/// # Errors
/// A format that weights can't be quantised to, or weights that are quantised already.
pub(super) fn packing<'a>(
    params: &Parameters,
    config: &ParallelConfig,
    cache: Option<(&'a Path, &'a str)>,
    progress: &'a (dyn Fn(usize) + Sync),
) -> Result<Option<Packing<'a>>> {
    if let Some(format) = config.weights {
        if !QuantFormat::ENCODABLE.contains(&format) {
            let right = "weights are quantised to q8_0, q4_0 or iq4_nl; the other formats are read from files that have them";
            return Err(Error::Option { option: "weights", value: format.name().into(), right });
        }
        if params.is_quantised() {
            let right = "the checkpoint's weights are quantised already, and doing it again would lose more than its format says; load them as stored";
            return Err(Error::Option { option: "weights", value: format.name().into(), right });
        }
    }
    let packs = config.weights.is_some() || params.is_quantised();
    Ok(packs.then_some(Packing { format: config.weights, cache, progress }))
}

/// Ranks of each stage where the device list is cut into equal groups, one a stage.
///
/// # Errors
/// An empty list, or one that the stages don't divide.
pub(super) fn ranks_per_stage(n_devices: usize, stages: usize) -> Result<usize> {
    if n_devices == 0 {
        return Err(Error::NoDevices);
    }
    if stages == 0 || !n_devices.is_multiple_of(stages) {
        let right = "give every stage as many devices as the others".to_owned();
        return Err(Error::Stages { stages, what: format!("{n_devices} devices"), right });
    }
    Ok(n_devices / stages)
}

/// What loading `params` onto `devices` will do, without loading anything. The list is cut into equal groups, one a stage.
///
/// # Errors
/// What makes the grid impossible: see [`Partition::new`]; a device that can't hold its part.
pub fn plan_summary(params: &Parameters, config: &ParallelConfig, devices: &[Device]) -> Result<PlanSummary> {
    let stages = config.stages.unwrap_or(1);
    let world = ranks_per_stage(devices.len(), stages)?;
    let partition = Partition::new(params.config(), stages, world, config.shares.as_deref(), config.granule(params))?;
    let packing = packing(params, config, None, &|_| {})?;
    let local: Vec<usize> = (0..world).collect();
    let layouts = lay_out(params, config, &partition, &local, devices, 1);
    let ranks = rank_infos(params, &partition, &layouts, packing)?;
    let room = room(params, config, &partition, &layouts, &ranks, packing)?;
    Ok(PlanSummary {
        memory: memory(params, &partition, &layouts, &ranks, room),
        ops_per_token: layouts.iter().map(|l| l.plan.ops.len()).sum(),
        submissions_per_token: layouts.iter().map(|l| l.plan.segments.len() * l.groups.len()).sum(),
        collectives_per_token: layouts.iter().map(|l| l.plan.collectives()).sum(),
        weight_bytes_per_token: ranks.iter().map(|r| r.weight_bytes).sum(),
        ranks,
    })
}
