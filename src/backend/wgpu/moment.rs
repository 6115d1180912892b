//! The moment: what changes from batch to batch, in buffers that are sized at load.

use super::dispatch::Split;
use super::gpu::Gpu;
use super::room::Bounds;
use crate::backend::{Batch, Room};
use crate::error::Result;

pub(super) struct Moment {
    /// `[4]`: rows, wanted rows, spans of positions and the positions in each.
    pub counts: wgpu::Buffer,
    /// `[rows, 2]`: where the table of the row's sequence starts, less its first page, wrapping; and the position.
    pub positions: wgpu::Buffer,
    /// `[wanted]`.
    pub wanted: wgpu::Buffer,
    /// `[rows, 2, head_dim / 2]`: cosines and sines.
    pub angles: wgpu::Buffer,
    /// The pages of every sequence, one sequence behind the other.
    pub tables: wgpu::Buffer,
    /// How many pages `tables` takes.
    entries: usize,
    room: Room,
    head_dim: usize,
    split: Option<Split>,
    /// Of the batch that the buffers hold.
    number: Option<u64>,
}

impl Moment {
    pub(super) fn new(gpu: &Gpu, bounds: Bounds, room: Room, head_dim: usize, split: Option<Split>) -> Result<Self> {
        let buffer = |what: &str, words: usize, usage| gpu.buffer(what, 4 * words.max(4) as u64, usage | wgpu::BufferUsages::COPY_DST);
        let storage = wgpu::BufferUsages::STORAGE;
        // Sequences share pages, so that each may have all of them.
        let entries = (room.rows * room.pages).min((bounds.binding / 4) as usize);
        Ok(Self {
            counts: buffer("the numbers of rows", 4, wgpu::BufferUsages::UNIFORM)?,
            positions: buffer("the positions", 2 * room.rows, storage)?,
            wanted: buffer("the wanted rows", room.wanted, storage)?,
            angles: buffer("the rotary angles", room.rows * head_dim, storage)?,
            tables: buffer("the page tables", entries, storage)?,
            entries,
            room,
            head_dim,
            split,
            number: None,
        })
    }

    /// All of them.
    pub(super) fn buffers(&self) -> [&wgpu::Buffer; 5] {
        [&self.counts, &self.positions, &self.wanted, &self.angles, &self.tables]
    }

    /// Uploads the batch unless it is there already.
    pub(super) fn write(&mut self, gpu: &Gpu, batch: &Batch) -> Result<()> {
        if self.number == Some(batch.number) {
            return Ok(());
        }
        let (rows, wanted) = (batch.rows.len(), batch.wanted.len());
        let entries: usize = batch.seqs.iter().map(|s| s.pages.len()).sum();
        if rows > self.room.rows || wanted > self.room.wanted || entries > self.entries || batch.rope.len() != rows * self.head_dim {
            return Err(gpu.owner.error(format!(
                "a batch of {rows} rows, {wanted} wanted, {entries} pages and {} rotary values doesn't fit a place for {} rows, \
                 {} wanted and {} pages with heads of {}",
                batch.rope.len(),
                self.room.rows,
                self.room.wanted,
                self.entries,
                self.head_dim,
            )));
        }
        let mut tables = Vec::with_capacity(entries);
        let mut starts = Vec::with_capacity(batch.seqs.len());
        for seq in &batch.seqs {
            starts.push((tables.len() as u32).wrapping_sub(seq.first_page));
            tables.extend_from_slice(&seq.pages);
        }
        let positions: Vec<[u32; 2]> = batch.rows.iter().map(|row| [starts[row.seq as usize], row.pos]).collect();
        let [spans, span] = Split::spans(self.split, batch);
        let counts = [rows as u32, wanted as u32, spans, span];
        gpu.queue.write_buffer(&self.counts, 0, bytemuck::cast_slice(&counts));
        gpu.queue.write_buffer(&self.positions, 0, bytemuck::cast_slice(&positions));
        gpu.queue.write_buffer(&self.wanted, 0, bytemuck::cast_slice(&batch.wanted));
        gpu.queue.write_buffer(&self.angles, 0, bytemuck::cast_slice(&batch.rope));
        gpu.queue.write_buffer(&self.tables, 0, bytemuck::cast_slice(&tables));
        self.number = Some(batch.number);
        Ok(())
    }
}
