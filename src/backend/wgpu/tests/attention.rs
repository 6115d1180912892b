//! Attention over pages: both cache types, several sequences, windows, uneven heads.

use half::f16;

use super::rig::{Model, Numbers, assert_close, download, f64s, gpus, guarded, linear, matrix, run, tunings};
use crate::backend::{KvType, Place, Room, Row, Seq};
use crate::kernels::matrix::DType;
use crate::partition::{Dim, RankPartition};
use crate::plan::ColumnParallel;

pub(super) const HIDDEN: usize = 24;

/// A model of the projections and attention alone; a rank has the query heads from one border to the next.
pub(super) fn model(head_dim: usize, n_heads: usize, n_kv_heads: usize, borders: &[usize]) -> Model {
    model_with(head_dim, n_heads, n_kv_heads, borders, &[])
}

/// The same, with biases and norms of heads where their names are given.
fn model_with(head_dim: usize, n_heads: usize, n_kv_heads: usize, borders: &[usize], optional: &[&'static str]) -> Model {
    let mut numbers = Numbers::new((head_dim + n_heads) as u64);
    let mut weight = |heads: usize| {
        let (rows, cols) = (heads * head_dim, HIDDEN);
        matrix(DType::F32, rows, cols, &numbers.take(rows * cols))
    };
    let (q, k, v) = (weight(n_heads), weight(n_kv_heads), weight(n_kv_heads));
    let mut model = Model::new(HIDDEN, head_dim, n_heads, n_kv_heads, 1).tensor("q", q).tensor("k", k).tensor("v", v).plan(|r| {
        let mut r = r.having(optional.iter().copied());
        let x = r.input();
        let q = r.linear(x, "q", Dim::Heads, ColumnParallel);
        let k = r.linear(x, "k", Dim::KvHeads, ColumnParallel);
        let v = r.linear(x, "v", Dim::KvHeads, ColumnParallel);
        r.head_norm(q, "q_norm");
        r.head_norm(k, "k_norm");
        r.rope(q);
        r.rope(k);
        let y = r.attend(0, q, k, v);
        r.all_gather(y)
    });
    for &name in optional {
        let elements = match name {
            "q.bias" => n_heads * head_dim,
            "k.bias" | "v.bias" => n_kv_heads * head_dim,
            _ => head_dim,
        };
        model.tensors.insert(name.to_owned(), matrix(DType::Bf16, 1, elements, &numbers.take(elements)));
    }
    let group = n_heads / n_kv_heads;
    let rank = |border: &[usize]| RankPartition {
        heads: border[0]..border[1],
        kv_heads: border[0] / group..border[1].div_ceil(group),
        channels: 0..1,
        vocab: 0..1,
    };
    model.partition.ranks = borders.windows(2).map(rank).collect();
    model
}

/// Rotates every pair of every head of `[positions, heads, head_dim]` by its position.
fn rotate(x: &mut [f64], width: usize, head_dim: usize) {
    let half = head_dim / 2;
    for (pos, row) in x.chunks_exact_mut(width).enumerate() {
        for head in row.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let (sine, cosine) = (pos as f64 * 10_000f64.powf(-(i as f64) / half as f64)).sin_cos();
                (head[i], head[i + half]) = (head[i] * cosine - head[i + half] * sine, head[i + half] * cosine + head[i] * sine);
            }
        }
    }
}

/// The projections, the rotation, the cache and attention in f64, for one sequence. `x`: `[positions, HIDDEN]`; answers `[positions, heads * head_dim]`.
pub(super) fn attend(model: &Model, x: &[f32], kv: KvType) -> Vec<f64> {
    let config = &model.config;
    let vector = |name: &str| {
        let vector = model.tensors.get(name)?;
        let mut values = vec![0.0; vector.cols()];
        vector.row_to_f32(0, &mut values);
        Some(f64s(&values))
    };
    let project = |name: &str| {
        let mut y = linear(&f64s(x), &model.tensors[&format!("{name}.weight")]);
        if let Some(bias) = vector(&format!("{name}.bias")) {
            y.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += b);
        }
        if let Some(norm) = vector(&format!("{name}_norm.weight")) {
            for head in y.chunks_exact_mut(norm.len()) {
                let mean = head.iter().map(|v| v * v).sum::<f64>() / norm.len() as f64;
                let scale = 1.0 / (mean + f64::from(config.rms_norm_eps)).sqrt();
                head.iter_mut().zip(&norm).for_each(|(v, w)| *v *= scale * w);
            }
        }
        y
    };
    let stored = |values: Vec<f64>| match kv {
        KvType::F32 => values,
        KvType::F16 => values.into_iter().map(|v| f16::from_f64(v).to_f64()).collect::<Vec<_>>(),
    };
    let (d, kv_width) = (config.head_dim, config.n_kv_heads * config.head_dim);
    let (mut q, mut k, v) = (project("q"), project("k"), stored(project("v")));
    rotate(&mut q, config.n_heads * d, d);
    rotate(&mut k, kv_width, d);
    let k = stored(k);
    let group = config.n_heads / config.n_kv_heads;
    let mut y = vec![0.0; q.len()];
    for pos in 0..x.len() / HIDDEN {
        let first = config.sliding_window.map_or(0, |w| (pos + 1).saturating_sub(w));
        for head in 0..config.n_heads {
            let at = (pos * config.n_heads + head) * d;
            let of = |values: &[f64], p: usize| values[p * kv_width + head / group * d..][..d].to_vec();
            let scores: Vec<f64> =
                (first..=pos).map(|p| q[at..at + d].iter().zip(of(&k, p)).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            for (score, p) in scores.iter().zip(first..) {
                let share = (score - top).exp() / total;
                y[at..at + d].iter_mut().zip(of(&v, p)).for_each(|(y, v)| *y += share * v);
            }
        }
    }
    y
}

/// The rows of a whole result that a rank reads: rank behind rank, each with its heads.
fn by_rank(model: &Model, y: &[f64]) -> Vec<f64> {
    let d = model.config.head_dim;
    let width = model.config.n_heads * d;
    let heads = model.partition.ranks.iter().map(|r| r.heads.start * d..r.heads.end * d);
    heads.flat_map(|h| y.chunks_exact(width).flat_map(move |row| row[h.clone()].to_vec())).collect()
}

const ROOM: Room = Room { rows: 200, wanted: 200, pages: 9 };

/// f16 keys shift scores by their rounding; the reference rounds what f64 gives, the device what f32 gives.
fn tolerance(kv: KvType) -> f64 {
    match kv {
        KvType::F32 => 3e-5,
        KvType::F16 => 3e-3,
    }
}

fn rows(seq: u32, positions: std::ops::Range<u32>) -> Vec<Row> {
    positions.map(|pos| Row { seq, pos }).collect()
}

#[test]
fn a_chunk_then_single_positions_see_all_that_came_before() {
    for device in gpus() {
        for (tuning, (head_dim, n_heads, n_kv_heads)) in tunings(&device).into_iter().zip([(8, 4, 2), (34, 3, 1), (128, 2, 2)]) {
            for kv in [KvType::F32, KvType::F16] {
                let model = model(head_dim, n_heads, n_kv_heads, &[0, n_heads]);
                let mut place = model.place(&device, tuning, ROOM);
                let x = Numbers::new(1).take(133 * HIDDEN);
                let expected = attend(&model, &x, kv);
                let width = n_heads * head_dim;
                // Pages in no order.
                let seq = Seq { pages: vec![4, 7, 0], first_page: 0 };
                let mut number = 0;
                for chunk in [0..130, 130..131, 131..133] {
                    number += 1;
                    let batch = model.batch(number, rows(0, chunk.start..chunk.end), vec![seq.clone()], kv);
                    let (start, end) = (chunk.start as usize, chunk.end as usize);
                    let found = guarded(&mut place, &batch, &x[start * HIDDEN..end * HIDDEN]);
                    let what = format!("{device} {tuning:?} {kv:?} heads of {head_dim}, {chunk:?}");
                    assert_close(&found, &expected[start * width..end * width], tolerance(kv), &what);
                }
            }
        }
    }
}

#[test]
fn a_window_hides_what_lies_before_it_and_its_pages_may_be_gone() {
    for device in gpus() {
        for (window, kv) in [(1, KvType::F32), (70, KvType::F32), (70, KvType::F16), (64, KvType::F32)] {
            let mut model = model(8, 2, 1, &[0, 2]);
            model.config.sliding_window = Some(window);
            // Split into spans, of which a window leaves some empty.
            let mut place = model.place(&device, tunings(&device)[0], ROOM);
            let x = Numbers::new(9).take(203 * HIDDEN);
            let expected = attend(&model, &x, kv);
            let all = Seq { pages: vec![5, 1, 2, 3], first_page: 0 };
            let found = guarded(&mut place, &model.batch(1, rows(0, 0..200), vec![all.clone()], kv), &x[..200 * HIDDEN]);
            assert_close(&found, &expected[..200 * 16], tolerance(kv), &format!("{device} window {window}"));
            // Position 200 sees 131 and later at most: the first page of f16 (128 positions), two of f32, are out of sight.
            let first = 131 / kv.page_len();
            let seq = Seq { pages: all.pages[first..].to_vec(), first_page: first as u32 };
            let found = guarded(&mut place, &model.batch(2, rows(0, 200..203), vec![seq], kv), &x[200 * HIDDEN..]);
            assert_close(&found, &expected[200 * 16..], tolerance(kv), &format!("{device} window {window}, freed"));
        }
    }
}

#[test]
fn sequences_of_one_batch_do_not_see_each_other() {
    for device in gpus() {
        let model = model(10, 4, 2, &[0, 4]);
        let mut place = model.on(&device, ROOM).unwrap();
        let mut numbers = Numbers::new(4);
        let (a, b) = (numbers.take(71 * HIDDEN), numbers.take(5 * HIDDEN));
        let (ya, yb) = (attend(&model, &a, KvType::F32), attend(&model, &b, KvType::F32));
        let seqs = vec![Seq { pages: vec![8, 2], first_page: 0 }, Seq { pages: vec![3], first_page: 0 }];
        let width = 4 * 10;
        let first = [rows(0, 0..70), rows(1, 0..4)].concat();
        let input = [&a[..70 * HIDDEN], &b[..4 * HIDDEN]].concat();
        let found = guarded(&mut place, &model.batch(1, first, seqs.clone(), KvType::F32), &input);
        assert_close(&found, &[&ya[..70 * width], &yb[..4 * width]].concat(), 3e-5, &device.to_string());
        let second = [rows(0, 70..71), rows(1, 4..5)].concat();
        let input = [&a[70 * HIDDEN..], &b[4 * HIDDEN..]].concat();
        let found = guarded(&mut place, &model.batch(2, second, seqs, KvType::F32), &input);
        assert_close(&found, &[&ya[70 * width..], &yb[4 * width..]].concat(), 3e-5, &device.to_string());
    }
}

#[test]
fn ranks_with_uneven_heads_share_the_head_at_their_border() {
    for device in gpus() {
        // 6 heads of 2 groups: the first rank needs both key-value heads, the second only the last.
        let model = model(12, 6, 2, &[0, 4, 6]);
        assert_eq!(model.partition.ranks[1].kv_heads, 1..2);
        let mut place = model.on(&device, ROOM).unwrap();
        let x = Numbers::new(6).take(30 * HIDDEN);
        let batch = model.batch(1, rows(0, 0..30), vec![Seq { pages: vec![6], first_page: 0 }], KvType::F32);
        let expected = by_rank(&model, &attend(&model, &x, KvType::F32));
        assert_close(&guarded(&mut place, &batch, &x), &expected, 3e-5, &device.to_string());
    }
}

#[test]
fn biases_are_added_and_heads_normed_before_they_are_rotated() {
    let (biases, norms) = (["q.bias", "k.bias", "v.bias"], ["q_norm.weight", "k_norm.weight"]);
    let every = [&biases[..], &norms[..]].concat();
    for (optional, head_dim, n_heads, n_kv_heads, borders) in [
        (&biases[..], 12, 6, 2, &[0, 4, 6][..]),
        (&norms, 34, 3, 1, &[0, 1, 3]),
        (&every, 8, 4, 2, &[0, 4]),
        (&norms, 256, 2, 2, &[0, 2]),
        (&["k.bias"], 8, 2, 1, &[0, 2]),
    ] {
        let model = model_with(head_dim, n_heads, n_kv_heads, borders, optional);
        let x = Numbers::new(5).take(71 * HIDDEN);
        let seq = Seq { pages: vec![6, 1], first_page: 0 };
        for kv in [KvType::F32, KvType::F16] {
            let expected = attend(&model, &x, kv);
            let width = n_heads * head_dim;
            let chunks = [0..67, 67..68, 68..71];
            let check = |found: &[f32], chunk: &std::ops::Range<u32>, what: &str| {
                let expected = by_rank(&model, &expected[chunk.start as usize * width..chunk.end as usize * width]);
                assert_close(found, &expected, tolerance(kv), &format!("{what}: {optional:?} {kv:?} heads of {head_dim}, {chunk:?}"));
            };
            let input = |chunk: &std::ops::Range<u32>| &x[chunk.start as usize * HIDDEN..chunk.end as usize * HIDDEN];
            let batch = |i: usize| model.batch(i as u64 + 1, rows(0, chunks[i].clone()), vec![seq.clone()], kv);
            let mut cpu = model.on_cpu();
            for (i, chunk) in chunks.iter().enumerate() {
                check(&run(&mut cpu, &batch(i), input(chunk)), chunk, "CPU");
            }
            for device in gpus() {
                for tuning in tunings(&device) {
                    let mut place = model.place(&device, tuning, ROOM);
                    for (i, chunk) in chunks.iter().enumerate() {
                        check(&guarded(&mut place, &batch(i), input(chunk)), chunk, &format!("{device} {tuning:?}"));
                    }
                }
            }
        }
    }
}

#[test]
fn heads_of_512_fit() {
    for device in gpus() {
        let model = model(512, 1, 1, &[0, 1]);
        let mut place = model.on(&device, ROOM).unwrap();
        let x = Numbers::new(8).take(3 * HIDDEN);
        let batch = model.batch(1, rows(0, 0..3), vec![Seq { pages: vec![0], first_page: 0 }], KvType::F16);
        let expected = attend(&model, &x, KvType::F16);
        assert_close(&guarded(&mut place, &batch, &x), &expected, tolerance(KvType::F16), &device.to_string());
    }
}

#[test]
fn a_copied_page_reads_like_the_original_and_is_written_alone() {
    // Ranks of different widths, so that pages differ in size.
    let model = model(12, 6, 2, &[0, 4, 6]);
    let mut places: Vec<Box<dyn Place>> = vec![Box::new(model.on_cpu())];
    places.extend(gpus().iter().map(|device| Box::new(model.on(device, ROOM).unwrap()) as Box<dyn Place>));
    for place in &mut places {
        for (kv, stored) in [(KvType::F32, 70), (KvType::F16, 130)] {
            let x = Numbers::new(12).take((stored + 2) * HIDDEN);
            let mut other = x.clone();
            other[stored * HIDDEN..].copy_from_slice(&Numbers::new(13).take(2 * HIDDEN));
            let step = |place: &mut dyn Place, x: &[f32], number: u64, copies: &[[u32; 2]], page: u32, at: usize| {
                let seqs = vec![Seq { pages: vec![4, page], first_page: 0 }];
                let mut batch = model.batch(number, rows(0, at as u32..at as u32 + 1), seqs, kv);
                batch.copies = copies.to_vec();
                run(place, &batch, &x[at * HIDDEN..(at + 1) * HIDDEN])
            };
            let first = stored as u64;
            let seqs = vec![Seq { pages: vec![4, 7], first_page: 0 }];
            run(place.as_mut(), &model.batch(first, rows(0, 0..stored as u32), seqs, kv), &x[..stored * HIDDEN]);
            // Two copies, the second of the first.
            let copied = step(place.as_mut(), &x, first + 1, &[[7, 2], [2, 5]], 5, stored);
            let what = format!("{} {kv:?}", place.device());
            assert_eq!(copied, step(place.as_mut(), &x, first + 2, &[], 7, stored), "{what}: the same bits");
            let all = attend(&model, &other, kv);
            let expected = |at: usize| by_rank(&model, &all[at * 72..(at + 1) * 72]);
            for (at, number) in [(stored, first + 3), (stored + 1, first + 4)] {
                let found = step(place.as_mut(), &other, number, &[], 5, at);
                assert_close(&found, &expected(at), tolerance(kv), &format!("{what}: the copy goes its own way"));
            }
            let all = attend(&model, &x, kv);
            let expected = by_rank(&model, &all[(stored + 1) * 72..]);
            let found = step(place.as_mut(), &x, first + 5, &[], 7, stored + 1);
            assert_close(&found, &expected, tolerance(kv), &format!("{what}: the original is as it was"));
        }
    }
}

#[test]
fn many_sequences_may_share_all_pages() {
    for device in gpus() {
        let model = model(8, 2, 1, &[0, 2]);
        let mut place = model.on(&device, ROOM).unwrap();
        let x = Numbers::new(5).take(HIDDEN);
        let seq = Seq { pages: (0..ROOM.pages as u32).collect(), first_page: 0 };
        let rows: Vec<Row> = (0..ROOM.rows as u32).map(|seq| Row { seq, pos: 0 }).collect();
        let found = guarded(&mut place, &model.batch(1, rows, vec![seq; ROOM.rows], KvType::F32), &x.repeat(ROOM.rows));
        assert_close(&found, &attend(&model, &x, KvType::F32).repeat(ROOM.rows), 3e-5, &device.to_string());
    }
}

#[test]
fn keys_and_values_are_written_where_they_belong_and_nowhere_else() {
    const GUARD: u32 = 0xdead_beef;
    for device in gpus() {
        for kv in [KvType::F32, KvType::F16] {
            let (head_dim, n_kv_heads) = (10, 2);
            let model = model(head_dim, 4, n_kv_heads, &[0, 4]);
            let mut place = model.on(&device, ROOM).unwrap();
            let words = place.caches.all[0].keys.size() as usize / 4;
            for buffer in [&place.caches.all[0].keys, &place.caches.all[0].values] {
                place.gpu.queue.write_buffer(buffer, 0, bytemuck::cast_slice(&vec![GUARD; words]));
            }
            // Positions 5 to 9 of page 3, and the first of page 1.
            let seqs = vec![Seq { pages: vec![3], first_page: 0 }, Seq { pages: vec![1], first_page: 0 }];
            let batch = model.batch(1, [rows(0, 5..10), rows(1, 0..1)].concat(), seqs, kv);
            run(&mut place, &batch, &Numbers::new(3).take(6 * HIDDEN));
            let head_words = head_dim * if kv == KvType::F32 { 4 } else { 2 } / 4;
            for buffer in [&place.caches.all[0].keys, &place.caches.all[0].values] {
                let found: Vec<u32> = download(&place.gpu, buffer);
                for (at, word) in found.iter().enumerate() {
                    let (slot, page_len) = (at / head_words, kv.page_len());
                    let (page, position) = (slot / page_len / n_kv_heads, slot % page_len);
                    let is_ours = (page == 3 && (5..10).contains(&position)) || (page == 1 && position == 0);
                    assert_eq!(*word != GUARD, is_ours, "{device} {kv:?}: word {at}, position {position} of page {page}");
                }
            }
        }
    }
}
