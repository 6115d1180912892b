// The end of the projections to queries, keys and values, one behind the other: queries and keys are rotated by the row's position,
// keys and values stored in their pages.
//
// Element i of a query's or key's head is followed by element i + head_dim / 2, with which it is rotated, so that a pair is two
// neighbours. Attention multiplies queries by keys in the same order.
@group(0) @binding(4) var<storage, read_write> q: array<vec2<f32>>;     // [rows, stride / 2]
@group(0) @binding(5) var<storage, read_write> keys: array<u32>;        // pages of a layer
@group(0) @binding(6) var<storage, read_write> values: array<u32>;
@group(0) @binding(7) var<storage, read> positions: array<vec2<u32>>;   // [rows]: table of the sequence, position
@group(0) @binding(8) var<storage, read> tables: array<u32>;            // pages of all sequences
@group(0) @binding(9) var<storage, read> angles: array<f32>;            // [rows, 2, half_head], cosines first

fn finish(row: u32, pair: u32, sums: vec2<f32>) {
    if (2u * pair >= shape.out) {
        return;
    }
    let half = shape.half_head;
    let queries = shape.heads * half;
    let kept = shape.kv_heads * half;
    let p = shape.first_out / 2u + pair;
    if (p < queries) {
        q[row * (shape.stride / 2u) + p] = rotated(row, p % half, sums);
    } else if (p < queries + kept) {
        let k = rotated(row, (p - queries) % half, sums);
        let slot = slot_of(row, p - queries);
        if (KV_F16) {
            keys[slot] = rounded(k);
        } else {
            keys[2u * slot] = bitcast<u32>(k.x);
            keys[2u * slot + 1u] = bitcast<u32>(k.y);
        }
    } else {
        let slot = slot_of(row, p - queries - kept);
        if (KV_F16) {
            values[slot] = rounded(sums);
        } else {
            values[2u * slot] = bitcast<u32>(sums.x);
            values[2u * slot + 1u] = bitcast<u32>(sums.y);
        }
    }
}

fn rotated(row: u32, i: u32, v: vec2<f32>) -> vec2<f32> {
    let cosine = angles[2u * row * shape.half_head + i];
    let sine = angles[(2u * row + 1u) * shape.half_head + i];
    return vec2(v.x * cosine - v.y * sine, v.y * cosine + v.x * sine);
}

// Where pair p of a row's keys or values is kept.
fn slot_of(row: u32, p: u32) -> u32 {
    let place = positions[row];
    return kv_pair(place.x, place.y, p / shape.half_head) + p % shape.half_head;
}

// What f16 can't hold is indeterminate: the largest it can instead.
fn rounded(v: vec2<f32>) -> u32 {
    let most = vec2(65504.0);
    return pack2x16float(clamp(v, -most, most));
}
