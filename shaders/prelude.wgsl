// What every kernel sees: the shape of its op, fixed at load, and how many rows this launch has.

struct Shape {
    rows_of: u32,       // which of `counts` the op's rows are: 0 all rows, 1 the wanted ones
    width: u32,         // elements in a row
    width4: u32,        // from one row to the next, in vectors of 4; what lies behind `width` is zero
    stride: u32,        // the same of what a linear layer or attention writes, in elements
    blocks: u32,        // blocks of 32 columns of a weight
    out: u32,           // outputs of a linear layer (of one block of its weight)
    first_out: u32,     // the first of them
    accumulate: u32,    // whether a linear layer adds to y, or a norm's input is added to first
    heads: u32,         // query heads of this rank
    half_head: u32,     // pairs of elements in a head
    kv_heads: u32,      // key-value heads held by this rank
    first_head: u32,    // this rank's first query head, counted over all ranks
    first_kv_head: u32, // its first key-value head, likewise
    group: u32,         // query heads that share a key-value head
    window: u32,        // positions seen, 0 for all
    lead: u32,          // zeros before the first element of a row of attention's y
    eps: f32,           // of RMSNorm
    scale: f32,         // 1 / sqrt(head_dim)
    phase: u32,         // blocks of a whole weight in front of its first here that share scales with it
    unused: u32,
}

@group(0) @binding(0) var<uniform> shape: Shape;
@group(0) @binding(1) var<uniform> counts: vec4<u32>; // rows, wanted rows, spans that attention is split into, positions in each

// Invocations in a workgroup.
override WG: u32 = 64u;

fn row_count() -> u32 {
    return select(counts.x, counts.y, shape.rows_of == 1u);
}

// Grids beyond the limit of one dimension are folded into two.
fn folded(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.x + group.y * groups.x;
}
