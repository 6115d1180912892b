//! [`Twins`]: what a lane has of its own where others have theirs.

use super::moment::Moment;
use crate::backend::Lane;

/// Of every lane but the first: the buffers of the first that are not shared, each with the lane's own.
pub(super) struct Twins(pub(super) Vec<Vec<(wgpu::Buffer, wgpu::Buffer)>>);

impl Twins {
    /// A lane a moment.
    pub(super) fn of(moments: &[Moment]) -> Self {
        let pairs = |moment: &Moment| moments[0].buffers().into_iter().cloned().zip(moment.buffers().into_iter().cloned()).collect();
        Self(moments[1..].iter().map(pairs).collect())
    }

    /// What is a lane's own where the first lane has `buffer`.
    pub(super) fn in_lane<'a>(&'a self, lane: Lane, buffer: &'a wgpu::Buffer) -> &'a wgpu::Buffer {
        let own = lane.checked_sub(1).and_then(|lane| self.0[lane].iter().find(|(first, _)| first == buffer));
        own.map_or(buffer, |(_, own)| own)
    }
}
