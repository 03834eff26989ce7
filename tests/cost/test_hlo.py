"""Collectives are read from the text of a compiled program."""

from molmo2_jax.cost import hlo

HLO = """HloModule jit_step
%all-reduce-scatter.1 (input: f32[64,32]) -> f32[16,32] {
  %all-reduce.7 = f32[64,32]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%body.1 (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %ag = bf16[64,32]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  %rs = f32[16,32]{1,0} fusion(%ag), kind=kCustom, calls=%all-reduce-scatter.1
}
%cond.1 (p: (s32[], bf16[64,32])) -> pred[] {
  %n = s32[] constant(36)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], bf16[64,32]) while(%t), condition=%cond.1, body=%body.1
  %sum = f32[8]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add
  %nothing = f32[8]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""


def test_collectives_are_read_with_their_loops_groups_and_networks():
    found = {one.kind: one for one in hlo.find_collectives(HLO, devices_per_slice=4)}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    gather, scatter, reduce = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
    assert (gather.times, gather.group, gather.size) == (36, 4, 64 * 32 * 2)
    assert gather.spans_slices  # devices 0, 2, 4, 6
    assert (scatter.times, scatter.group, scatter.size, scatter.spans_slices) == (36, 4, 64 * 32 * 4, False)
    assert (reduce.times, reduce.group, reduce.traffic) == (1, 8, 2 * 32 * 7 / 8)
    assert hlo.collectives(HLO, 8).keys() == {"ici all-gather", "ici reduce-scatter", "ici all-reduce"}


GATHERS = """HloModule jit_step
%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %s = bf16[] add(%a, %b)
}
%placed (p0: bf16[16,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = bf16[] constant(0)
  %zeros = bf16[64,32]{1,0:T(8,128)(2,1)} broadcast(%zero), dimensions={}
  %at = s32[] constant(0)
  %update = bf16[64,32]{1,0:T(8,128)(2,1)} dynamic-update-slice(%zeros, %p0, %p1, %at)
  ROOT %flat = bf16[2048]{0:T(1024)} bitcast(%update)
}
%summed (p: bf16[2048]) -> bf16[2048] {
  %p = bf16[2048]{0:T(1024)} parameter(0)
  ROOT %gather = bf16[2048]{0:T(1024)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}
ENTRY %main (w: bf16[16,32], g: bf16[2048], i: s32[]) -> bf16[2048] {
  %w = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[2048]{0:T(1024)} parameter(1)
  %i = s32[] parameter(2)
  %whole = bf16[2048]{0:T(1024)} fusion(%w, %i), kind=kLoop, calls=%placed
  %gathered = bf16[2048]{0:T(1024)} fusion(%whole), kind=kCustom, calls=%summed
  ROOT %gradient = bf16[2048]{0:T(1024)} all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_gather_that_is_written_as_a_sum_is_distinguished_from_a_sum():
    kinds = {one.kind: one.traffic for one in hlo.find_collectives(GATHERS, devices_per_slice=4)}
    assert kinds == {hlo.GATHER_BY_SUM: 2 * 2 * 2048 * 3 / 4, "all-reduce": 2 * 2 * 2048 * 3 / 4}


SEND = """ENTRY %main (a: f32[8]) -> f32[8] {
  %send = (f32[1,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0"}
  %recv = (f32[1,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0"}
}
"""


def test_traffic_between_slices_is_read_from_messages_to_their_hosts():
    assert hlo.collectives(SEND, 4) == {"dcn all-reduce": 4 * 8 * 128}


# From a step of a nano model for v5e:2x4, with the compiler's usual effort; metadata and unrelated lines cut.
OVERLAPPED = """%fused_computation.3071 (param_0.10316: bf16[1,32,256]) -> (bf16[1,32,256], bf16[1,256,256]) {
  %param_0.10316 = bf16[1,32,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1005 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.10316), channel_id=163, \
replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}, dimensions={1}, use_global_device_ids=true
  ROOT %custom-call.145 = (bf16[1,32,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,256,256]{2,1,0:T(8,128)(2,1)\
S(1)}) custom-call(%all-gather.1005), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.4189 (param_0.10321: bf16[1,32,256]) -> bf16[1,256,256] {
  %param_0.10321 = bf16[1,32,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1007 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.10321), channel_id=163, \
replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}
%fused_computation.3073 (param_0.10324: bf16[1,32,256], param_1.10755: bf16[1,256,256]) -> bf16[1,256,256] {
  %param_0.10324 = bf16[1,32,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.10755 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.1009 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.10324), channel_id=163, \
replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}, dimensions={1}, use_global_device_ids=true
  ROOT %custom-call.147 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.10324, \
%param_1.10755, %all-gather.1009), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main.258_spmd (param: bf16[1,32,256]) -> bf16[1,256,256] {
  %async-collective-start.19 = (bf16[1,32,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,256,256]{2,1,0:T(8,128)(2,1)\
S(1)}) fusion(%slice.1532), kind=kCustom, calls=%fused_computation.3071
  %fusion.4189 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.9939), kind=kCustom, \
calls=%async_collective_fusion.4189
  %async-collective-done.19 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.9949, \
%get-tuple-element.9950), kind=kCustom, calls=%fused_computation.3073
}
"""


def test_a_gather_that_runs_in_the_background_is_counted_once():
    assert OVERLAPPED.count(" all-gather(") == 3
    assert hlo.collectives(OVERLAPPED, 8) == {"ici all-gather": 256 * 256 * 2 * 7 / 8}
