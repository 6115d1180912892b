// Reductions over a workgroup through its memory alone: a tree. WG is a power of two.

struct Lane {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> partial: array<vec4<f32>, WG>;

fn group_sum(v: vec4<f32>, lane: Lane) -> vec4<f32> {
    partial[lane.index] = v;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            partial[lane.index] += partial[lane.index + half];
        }
    }
    workgroupBarrier();
    let sum = partial[0];
    workgroupBarrier(); // the next reduction writes partial
    return sum;
}

fn group_max(v: f32, lane: Lane) -> f32 {
    partial[lane.index].x = v;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            partial[lane.index].x = max(partial[lane.index].x, partial[lane.index + half].x);
        }
    }
    workgroupBarrier();
    let top = partial[0].x;
    workgroupBarrier();
    return top;
}
