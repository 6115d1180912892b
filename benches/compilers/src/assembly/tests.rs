use super::*;

/// `for (uint i = thread; i < n; i += 64) sum += dot(w[row * n + i], x[i])` and a sum through LDS, as Mesa 22.3 compiles it for Navi 10.
const MATVEC: &str = include_str!("matvec.navi10.s");

#[test]
fn the_larger_loop_is_first_and_counts_what_is_repeated() {
    let first = Instructions { valu: 9, salu: 8, vmem: 2, smem: 4, lds: 0, control: 9 };
    let second = Instructions { valu: 3, salu: 4, vmem: 0, smem: 0, lds: 3, control: 7 };
    let expected = [
        Loop { first: "BB1".into(), last: "BB9".into(), instructions: first },
        Loop { first: "BB11".into(), last: "BB20".into(), instructions: second },
    ];
    assert_eq!(inner_loops(MATVEC), expected);
    assert_eq!(first.total(), 32);
}

#[test]
fn every_line_of_code_counts_once() {
    let mut all = Instructions::default();
    blocks(MATVEC).iter().for_each(|block| all += block.instructions);
    // The driver's own count of the same kernel.
    assert_eq!(all.total(), 68);
    assert_eq!(all.lds, 5);
}

#[test]
fn a_loop_around_a_loop_and_two_ways_back_are_one_inner_loop() {
    let assembly = "
BB0:
BB1:
\tv_add_f32_e32 v1, v1, v2
\tv_add_f32_e32 v1, v1, v3
BB2:
\tv_add_f32_e32 v1, v1, v4
\ts_cbranch_vccz BB2
BB3:
\tbuffer_load_b32 v1, v2, s[4:7], 0 offen
\ts_branch BB2
BB4:
\ts_cbranch_scc1 BB1
BB5:
\ts_endpgm
";
    let instructions = Instructions { valu: 1, vmem: 1, control: 2, ..Instructions::default() };
    assert_eq!(inner_loops(assembly), [Loop { first: "BB2".into(), last: "BB3".into(), instructions }]);
}

#[test]
fn only_branches_back_make_loops() {
    assert_eq!(inner_loops("BB0:\n\ts_cbranch_execz BB1\n\tv_mov_b32_e32 v1, 0\nBB1:\n\ts_endpgm\n"), []);
    assert_eq!(inner_loops(""), []);
    assert_eq!(inner_loops("\tv_mov_b32_e32 v1, 0\n\t(then repeated 2 times)\n"), []);
}
