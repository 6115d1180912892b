// Reductions over a workgroup: within each subgroup by its own operation, over subgroups through memory.

struct Lane {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

var<workgroup> partial: array<vec4<f32>, WG>; // one a subgroup; how many there are is the driver's choice

fn group_sum(v: vec4<f32>, lane: Lane) -> vec4<f32> {
    var sum = subgroupAdd(v);
    if (lane.subgroups == 1u) {
        return sum;
    }
    partial[lane.subgroup] = sum; // every lane of a subgroup writes the same
    workgroupBarrier();
    sum = partial[0];
    for (var i = 1u; i < lane.subgroups; i++) {
        sum += partial[i];
    }
    workgroupBarrier(); // the next reduction writes partial
    return sum;
}

fn group_max(v: f32, lane: Lane) -> f32 {
    var top = subgroupMax(v);
    if (lane.subgroups == 1u) {
        return top;
    }
    partial[lane.subgroup].x = top;
    workgroupBarrier();
    top = partial[0].x;
    for (var i = 1u; i < lane.subgroups; i++) {
        top = max(top, partial[i].x);
    }
    workgroupBarrier();
    return top;
}
