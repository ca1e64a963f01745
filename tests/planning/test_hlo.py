"""What a program moves, against programs that can be counted by hand."""

from mixln_jax.planning.hlo import Collective, traffic

# As the TPU compiler writes it: no trip counts, a counter that goes through copies and steps by 2, an all-gather that
# is cut into two fusions of one channel, arrays in on-chip memory (S(1)), a fusion that reads one row of a stacked one.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%gather_start (p0.1: bf16[1,64]) -> bf16[4,64] {
  %p0.1 = bf16[1,64]{1,0:T(8,128)} parameter(0)
  ROOT %ag.1 = bf16[4,64]{1,0} all-gather(%p0.1), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x','y'}
}

%gather_done (p0.2: bf16[1,64]) -> bf16[4,64] {
  %p0.2 = bf16[1,64]{1,0:T(8,128)} parameter(0)
  ROOT %ag.2 = bf16[4,64]{1,0} all-gather(%p0.2), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x','y'}
}

%row (p0.3: f32[8,100], p1.3: s32[]) -> f32[1,100] {
  %p0.3 = f32[8,100]{1,0} parameter(0)
  %p1.3 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  ROOT %slice.3 = f32[1,100]{1,0} dynamic-slice(%p0.3, %p1.3, %zero.3), dynamic_slice_sizes={1,100}
}

%body (state.4: (s32[], f32[8,100], bf16[1,64])) -> (s32[], f32[8,100], bf16[1,64]) {
  %state.4 = (s32[]{:T(128)}, f32[8,100]{1,0}, bf16[1,64]{1,0:T(8,128)S(1)}) parameter(0)
  %counter = s32[] get-tuple-element(%state.4), index=0
  %stacked = f32[8,100]{1,0} get-tuple-element(%state.4), index=1
  %shard = bf16[1,64]{1,0:T(8,128)S(1)} get-tuple-element(%state.4), index=2
  %first = bf16[4,64]{1,0:T(8,128)S(1)} fusion(%shard), kind=kCustom, calls=%gather_start
  %second = bf16[4,64]{1,0:T(8,128)S(1)} fusion(%shard), kind=kCustom, calls=%gather_done
  %picked = f32[1,100]{1,0} fusion(%stacked, %counter), kind=kLoop, calls=%row
  %two = s32[] constant(2)
  %counter.copy = s32[]{:T(128)S(6)} copy(%counter)
  %next = s32[]{:T(128)S(6)} add(%counter.copy, %two)
  ROOT %tuple.4 = (s32[], f32[8,100], bf16[1,64]) tuple(%next, %stacked, %shard)
}

%condition (state.5: (s32[], f32[8,100], bf16[1,64])) -> pred[] {
  %state.5 = (s32[]{:T(128)}, f32[8,100]{1,0}, bf16[1,64]{1,0:T(8,128)S(1)}) parameter(0)
  %counter.5 = s32[] get-tuple-element(%state.5), index=0
  %eight = s32[] constant(8)
  ROOT %less = pred[] compare(%counter.5, %eight), direction=LT
}

ENTRY %main (weights: f32[8,100], small: bf16[1,64]) -> f32[8,100] {
  %weights = f32[8,100]{1,0} parameter(0)
  %small = bf16[1,64]{1,0} parameter(1)
  %shard.copy = bf16[1,64]{1,0:T(8,128)S(1)} copy(%small)
  %start = s32[] constant(0)
  %start.copy = s32[] copy(%start)
  %initial = (s32[], f32[8,100], bf16[1,64]) tuple(%start.copy, %weights, %shard.copy)
  %loop = (s32[], f32[8,100], bf16[1,64]) while(%initial), condition=%condition, body=%body
  %grown = f32[8,100]{1,0} get-tuple-element(%loop), index=1
  %total = f32[8,100]{1,0} all-reduce(%grown), channel_id=9, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %doubled = f32[8,100]{1,0} add(%total, %grown)
}
"""


def test_a_program_as_the_tpu_compiler_writes_it():
  counted = traffic(TPU)
  assert counted.unknown_loops == ()
  assert counted.collectives == {
    "all-gather": Collective(runs=4, bytes=4 * 128, sent=4 * 128 * 3),  # once a turn, not once a fusion
    "all-reduce": Collective(runs=1, bytes=3200, sent=3200),  # 2 × (2 - 1) / 2
  }
  # A turn: a row in and out, the counter read for it and for its copy, the constant; the rest is on the chip.
  turn = 2 * 400 + 4 + 4 + 4
  outside = 128 + 2 * 4 + 2 * 3200 + 3 * 3200  # the copies, the all-reduce, the sum
  assert counted.memory_bytes == 4 * turn + outside


def test_a_loop_whose_turns_are_not_known_counts_once_and_is_named():
  unknown = TPU.replace("direction=LT", "direction=NE")
  counted = traffic(unknown)
  assert counted.unknown_loops == ("loop",)
  assert counted.collectives["all-gather"].runs == 1
