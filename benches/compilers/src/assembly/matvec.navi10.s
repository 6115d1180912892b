BB0:
	v_mov_b32_e32 v1, 0                                         ; 7e020280
	v_mov_b32_e32 v2, v0                                        ; 7e040300
	s_mov_b64 s[0:1], exec                                      ; be80047e
BB1:
	s_mov_b32 s6, s3                                            ; be860303
	s_movk_i32 s7, 0x8000                                       ; b0078000
	s_load_dwordx4 s[8:11], s[6:7], 0x10                        ; f4080203 fa000010
	s_waitcnt lgkmcnt(0)                                        ; bf8cc07f
	s_buffer_load_dword s5, s[8:11], null                       ; f4200144 fa000000
	s_mov_b64 s[8:9], exec                                      ; be88047e
	s_waitcnt lgkmcnt(0)                                        ; bf8cc07f
	s_waitcnt_depctr 0xfffe                                     ; bfa3fffe
	(then repeated 1 times)
	v_cmpx_le_u32_e32 s5, v2                                    ; 7da60405
BB2:
	s_andn2_b64 s[8:9], s[8:9], exec                            ; 8a887e08
	s_cbranch_scc0 BB10                                         ; bf840019
BB9:
	s_mov_b64 exec, s[8:9]                                      ; befe0408
	s_mov_b32 s6, s2                                            ; be860302
	s_movk_i32 s7, 0x8000                                       ; b0078000
	s_clause 0x1                                                ; bfa10001
	s_load_dwordx4 s[8:11], s[6:7], null                        ; f4080203 fa000000
	s_load_dwordx4 s[12:15], s[6:7], 0x10                       ; f4080303 fa000010
	s_mul_i32 s5, s4, s5                                        ; 93050504
	v_add_lshl_u32 v3, s5, v2, 4                                ; d7470003 02120405
	s_waitcnt lgkmcnt(0)                                        ; bf8cc07f
	buffer_load_dwordx4 v[4:7], v3, s[8:11], 0 offen            ; e0381000 80020403
	v_lshlrev_b32_e32 v3, 4, v2                                 ; 34060484
	buffer_load_dwordx4 v[8:11], v3, s[12:15], 0 offen          ; e0381000 80030803
	v_add_nc_u32_e32 v2, 64, v2                                 ; 4a0404c0
	s_waitcnt vmcnt(0)                                          ; bf8c3f70
	v_mul_f32_e32 v3, v7, v11                                   ; 10061707
	v_mac_f32_e32 v3, v6, v10                                   ; 3e061506
	v_mac_f32_e32 v3, v5, v9                                    ; 3e061305
	v_mac_f32_e32 v3, v4, v8                                    ; 3e061104
	v_add_f32_e32 v1, v1, v3                                    ; 06020701
	s_branch BB1                                                ; bf82ffd9
BB10:
	s_mov_b64 exec, s[0:1]                                      ; befe0400
	v_lshlrev_b32_e32 v2, 2, v0                                 ; 34040082
	s_waitcnt_vscnt null, 0x0                                   ; bbfd0000
	ds_write_b32 v2, v1                                         ; d8340000 00000102
	s_mov_b32 s5, 32                                            ; be8503a0
BB11:
	s_cmp_ge_u32 0, s5                                          ; bf090580
	s_cbranch_scc1 BB21                                         ; bf850013
BB14:
	s_mov_b64 s[0:1], exec                                      ; be80047e
	s_waitcnt_depctr 0xfffe                                     ; bfa3fffe
	(then repeated 1 times)
	v_cmpx_gt_u32_e32 s5, v0                                    ; 7da80005
	s_cbranch_execz BB20                                        ; bf88000a
BB15:
	v_add_lshl_u32 v1, s5, v0, 2                                ; d7470001 020a0005
	ds_read_b32 v1, v1                                          ; d8d80000 01000001
	ds_read_b32 v3, v2                                          ; d8d80000 03000002
	s_waitcnt lgkmcnt(0)                                        ; bf8cc07f
	v_add_f32_e32 v1, v3, v1                                    ; 06020303
	ds_write_b32 v2, v1                                         ; d8340000 00000102
BB20:
	s_waitcnt_depctr 0xffe3                                     ; bfa3ffe3
	s_mov_b64 exec, s[0:1]                                      ; befe0400
	s_lshr_b32 s5, s5, 1                                        ; 90058105
	s_branch BB11                                               ; bf82ffeb
BB21:
	s_mov_b64 s[0:1], exec                                      ; be80047e
	s_waitcnt_depctr 0xfffe                                     ; bfa3fffe
	v_cmpx_eq_i32_e32 0, v0                                     ; 7d240080
	s_cbranch_execz BB27                                        ; bf880009
BB22:
	v_mov_b32_e32 v0, 0                                         ; 7e000280
	ds_read_b32 v0, v0                                          ; d8d80000 00000000
	s_load_dwordx4 s[8:11], s[6:7], null                        ; f4080203 fa000000
	s_lshl_b32 s2, s4, 2                                        ; 8f028204
	s_waitcnt lgkmcnt(0)                                        ; bf8cc07f
	buffer_store_dword v0, off, s[8:11], s2 glc                 ; e0704000 02020080
BB27:
	s_endpgm                                                    ; bf810000
