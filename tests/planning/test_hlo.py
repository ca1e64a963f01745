"""What a program moves, against programs that can be counted by hand."""

from mixln_jax.planning.hlo import Collective, traffic

# As the TPU compiler writes it: no trip counts, a counter that goes through copies and steps by 2, an all-gather that
# is cut into two fusions of one channel, arrays in on-chip memory (S(1)), a fusion that reads one row of a stacked one.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%gather_start (p0.1: bf16[1,64]) -> bf16[4,64] {
  %p0.1 = bf16[1,64]{1,0:T(8,128)} parameter(0)
  %ag.1 = bf16[4,64]{1,0} all-gather(%p0.1), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x','y'}
  ROOT %started = bf16[4,64]{1,0:S(1)} custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%gather_done (p0.2: bf16[1,64]) -> bf16[4,64] {
  %p0.2 = bf16[1,64]{1,0:T(8,128)} parameter(0)
  %ag.2 = bf16[4,64]{1,0} all-gather(%p0.2), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x','y'}
  ROOT %done = bf16[4,64]{1,0:S(1)} custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"
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
    "all-reduce": Collective(runs=1, bytes=3200, sent=3200, waited_for=3200),  # 2 × (2 - 1) / 2
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


# A gather that starts before a loop, is carried forward in a fusion of each of its five turns beside that fusion's own
# work, and ends after it: the compiler's three forms, with its buffers (operand and result) as aliased results.
CONTINUED = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p.1: f32[10,100]) -> results {
  %p.1 = f32[10,100]{1,0} parameter(0)
  %ag.1 = f32[40,100]{1,0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3}}
  ROOT %s.1 = (started) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%step (p.2: f32[10,100], q.2: f32[40,100], r.2: u32[], t.2: f32[50]) -> results {
  %p.2 = f32[10,100]{1,0} parameter(0)
  %q.2 = f32[40,100]{1,0} parameter(1)
  %r.2 = u32[]{:S(2)} parameter(2)
  %t.2 = f32[50]{0} parameter(3)
  %own.2 = f32[50]{0} negate(%t.2)
  %ag.2 = f32[40,100]{1,0} all-gather(%p.2), channel_id=3, replica_groups={{0,1,2,3}}, {"async_collective_fusion_config":{}}
  ROOT %tuple.2 = (f32[50], f32[10,100], f32[40,100], u32[]) tuple(%own.2, %p.2, %ag.2, %r.2)
}

%done (p.3: f32[10,100], q.3: f32[40,100], r.3: u32[]) -> f32[40,100] {
  %p.3 = f32[10,100]{1,0} parameter(0)
  %q.3 = f32[40,100]{1,0} parameter(1)
  %r.3 = u32[]{:S(2)} parameter(2)
  %ag.3 = f32[40,100]{1,0} all-gather(%p.3), channel_id=3, replica_groups={{0,1,2,3}}, {"async_collective_fusion_config":{}}
  ROOT %d.3 = f32[40,100]{1,0} custom-call(%q.3, %ag.3), custom_call_target="AsyncCollectiveDone"
}

%body (state.4: state) -> state {
  %state.4 = (s32[]{:S(2)}, f32[10,100]{1,0}, f32[40,100]{1,0}, u32[]{:S(2)}, f32[50]{0}) parameter(0)
  %counter.4 = s32[]{:S(2)} get-tuple-element(%state.4), index=0
  %piece.4 = f32[10,100]{1,0} get-tuple-element(%state.4), index=1
  %whole.4 = f32[40,100]{1,0} get-tuple-element(%state.4), index=2
  %flag.4 = u32[]{:S(2)} get-tuple-element(%state.4), index=3
  %work.4 = f32[50]{0} get-tuple-element(%state.4), index=4
  %both.4 = (f32[50], f32[10,100], f32[40,100], u32[]{:S(2)}) fusion(%piece.4, %whole.4, %flag.4, %work.4), BOTH
  %worked.4 = f32[50]{0} get-tuple-element(%both.4), index=0
  %gathered.4 = f32[40,100]{1,0} get-tuple-element(%both.4), index=2
  %one.4 = s32[]{:S(2)} constant(1)
  %next.4 = s32[]{:S(2)} add(%counter.4, %one.4)
  ROOT %tuple.4 = (state) tuple(%next.4, %piece.4, %gathered.4, %flag.4, %worked.4)
}

%condition (state.5: state) -> pred[] {
  %state.5 = (s32[]{:S(2)}, f32[10,100]{1,0}, f32[40,100]{1,0}, u32[]{:S(2)}, f32[50]{0}) parameter(0)
  %counter.5 = s32[]{:S(2)} get-tuple-element(%state.5), index=0
  %five.5 = s32[]{:S(2)} constant(5)
  ROOT %less.5 = pred[]{:S(2)} compare(%counter.5, %five.5), direction=LT
}

ENTRY %main (head: f32[10,100], x: f32[50]) -> f32[40,100] {
  %head = f32[10,100]{1,0} parameter(0)
  %x = f32[50]{0} parameter(1)
  %zero = s32[]{:S(2)} constant(0)
  %begun = (f32[10,100], f32[40,100], u32[]{:S(2)}) fusion(%head), output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %piece = f32[10,100]{1,0} get-tuple-element(%begun), index=0
  %whole = f32[40,100]{1,0} get-tuple-element(%begun), index=1
  %flag = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %first = (state) tuple(%zero, %piece, %whole, %flag, %x)
  %loop = (state) while(%first), condition=%condition, body=%body
  %last.piece = f32[10,100]{1,0} get-tuple-element(%loop), index=1
  %last.whole = f32[40,100]{1,0} get-tuple-element(%loop), index=2
  %last.flag = u32[]{:S(2)} get-tuple-element(%loop), index=3
  %kernel = f32[50]{0:S(1)} custom-call(), custom_call_target="tpu_custom_call"
  ROOT %ended = f32[40,100]{1,0} fusion(%last.piece, %last.whole, %last.flag), output_to_operand_aliasing={{}: (1, {})}, calls=%done
}
""".replace(  # noqa: E501
  "BOTH",
  "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}, calls=%step, "
  'backend_config={"window_config":{"estimated_cycles":"700"}}',
)


def test_a_gather_that_is_continued_through_a_loop_counts_where_it_starts():
  """Catches a gather counted at each turn, and its buffers counted as traffic of every fusion that carries it."""
  counted = traffic(CONTINUED)
  assert counted.collectives == {"all-gather": Collective(runs=1, bytes=4000, sent=3 * 4000)}
  start, own_work = 4000 + 16000, 2 * 200
  assert counted.memory_bytes == start + 5 * own_work


def test_what_the_compiler_estimates_counts_with_the_turns():
  """Catches an estimate of a loop's body that counts once, and a kernel that nobody is told of."""
  counted = traffic(CONTINUED)
  assert counted.cycles == 5 * 700
  assert counted.kernel_runs == 1


def test_a_slice_reads_what_it_returns():
  """Catches a prefetch of a piece that reads the whole array, and a slice of on-chip memory that counts as traffic."""
  text = """\
HloModule jit_step, is_scheduled=true, num_partitions=1

ENTRY %main (x: f32[100,10]) -> f32[10,10] {
  %x = f32[100,10]{1,0} parameter(0)
  %begun = ((f32[100,10]{1,0}), f32[20,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:20], [0:10]}
  %near = f32[20,10]{1,0:S(1)} slice-done(%begun)
  ROOT %piece = f32[10,10]{1,0} slice(%near), slice={[0:10], [0:10]}
}
"""
  assert traffic(text).memory_bytes == 800 + 400
