// y = softmax(q k^T / sqrt(head_dim)) v over the positions that a row sees: a workgroup a (row, head), or a (row, head, span of positions),
// whose parts shaders/attend_merge.wgsl puts together.
//
// It walks the positions in blocks of 64, a lane each, with an online softmax: what was summed before is scaled down when a
// block holds a larger score. Nothing masked is infinite, and no exponent is above 0.
@group(0) @binding(2) var<storage, read> q: array<vec2<f32>>;           // [rows, 2 width4], as shaders/finish/qkv.wgsl leaves it
@group(0) @binding(3) var<storage, read_write> y: array<f32>;           // [rows, stride]
@group(0) @binding(4) var<storage, read> keys: array<u32>;              // pages of a layer
@group(0) @binding(5) var<storage, read> values: array<u32>;
@group(0) @binding(6) var<storage, read> positions: array<vec2<u32>>;   // [rows]: table of the sequence, position
@group(0) @binding(7) var<storage, read> tables: array<u32>;            // pages of all sequences
@group(0) @binding(8) var<storage, read_write> parts: array<f32>;       // [rows, heads, spans, 2 HALF_HEAD + 2]

override HALF_HEAD: u32 = 32u; // shape.half_head, for the arrays

const LOWEST: f32 = -1e30;  // below any score
const FAINTEST: f32 = -80.0; // exp of it, 2e-35, is nothing beside the largest weight, 1

var<workgroup> query: array<vec2<f32>, HALF_HEAD>; // scaled
var<workgroup> sums: array<vec2<f32>, HALF_HEAD>;  // each pair is touched by one lane
var<workgroup> shares: array<f32, BLOCK>;          // of the block's positions

fn key2(pair: u32) -> vec2<f32> {
    if (KV_F16) {
        return unpack2x16float(keys[pair]);
    }
    return bitcast<vec2<f32>>(vec2(keys[2u * pair], keys[2u * pair + 1u]));
}

fn value2(pair: u32) -> vec2<f32> {
    if (KV_F16) {
        return unpack2x16float(values[pair]);
    }
    return bitcast<vec2<f32>>(vec2(values[2u * pair], values[2u * pair + 1u]));
}

@compute @workgroup_size(BLOCK)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let index = folded(group, groups);
    let spans = counts.z;
    let row = index / (shape.heads * spans);
    let head = index / spans % shape.heads;
    let span = index % spans;
    if (row >= row_count()) {
        return;
    }
    let q_at = row * 2u * shape.width4 + head * HALF_HEAD;
    for (var i = lane.index; i < HALF_HEAD; i += BLOCK) {
        query[i] = q[q_at + i] * shape.scale;
        sums[i] = vec2(0.0);
    }
    workgroupBarrier();

    let kv_head = (shape.first_head + head) / shape.group - shape.first_kv_head;
    let place = positions[row];
    var last = place.y;
    var first = 0u;
    if (shape.window > 0u && last + 1u > shape.window) {
        first = last + 1u - shape.window;
    }
    if (spans > 1u) {
        // The first span begins with the first block that the row sees.
        let start = first / BLOCK * BLOCK + span * counts.w;
        first = max(first, start);
        last = min(last, start + counts.w - 1u);
    }
    var top = LOWEST;
    var total = 0.0;
    // A span that the row sees nothing of has its first position behind its last.
    for (var block = first / BLOCK; block * BLOCK <= last && first <= last; block++) {
        // A block lies within one page.
        let start = block * BLOCK;
        let pairs = kv_pair(place.x, start, kv_head);

        let position = start + lane.index;
        let seen = position >= first && position <= last;
        var score = LOWEST;
        if (seen) {
            score = 0.0;
            for (var i = 0u; i < HALF_HEAD; i++) {
                score += dot(query[i], key2(pairs + lane.index * HALF_HEAD + i));
            }
        }
        let new_top = max(top, group_max(score, lane));
        let share = select(0.0, exp(max(score - new_top, FAINTEST)), seen);
        let kept = exp(max(top - new_top, FAINTEST));
        shares[lane.index] = share;
        total = total * kept + group_sum(vec4(share, 0.0, 0.0, 0.0), lane).x;
        workgroupBarrier();

        let begin = max(first, start) - start;
        let end = min(last, start + BLOCK - 1u) - start;
        for (var i = lane.index; i < HALF_HEAD; i += BLOCK) {
            var sum = sums[i] * kept;
            for (var j = begin; j <= end; j++) {
                sum += shares[j] * value2(pairs + j * HALF_HEAD + i);
            }
            sums[i] = sum;
        }
        workgroupBarrier(); // the next block writes shares
        top = new_top;
    }
    if (spans > 1u) {
        let at = index * (2u * HALF_HEAD + 2u);
        for (var i = lane.index; i < HALF_HEAD; i += BLOCK) {
            parts[at + 2u * i] = sums[i].x;
            parts[at + 2u * i + 1u] = sums[i].y;
        }
        if (lane.index == 0u) {
            parts[at + 2u * HALF_HEAD] = top;
            parts[at + 2u * HALF_HEAD + 1u] = total;
        }
        return;
    }
    for (var i = lane.index; i < HALF_HEAD; i += BLOCK) {
        let mean = sums[i] / total;
        let at = row * shape.stride + shape.lead + 2u * (head * HALF_HEAD + i);
        y[at] = mean.x;
        y[at + 1u] = mean.y;
    }
}
