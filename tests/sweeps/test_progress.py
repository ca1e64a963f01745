"""The time left of a run and of a study, from the lines that runs print, by a clock made by hand."""

from mixln_jax.sweeps.progress import EVERY, StudyProgress


def test_the_time_left_of_run_and_study():
  """Would catch a study's time that counts runs that are done or ended early, or only those to come."""
  now = [0.0]
  progress = StudyProgress(clock=lambda: now[0])
  progress.start_run(later_steps=10)
  assert progress.seen("program    training step, hash 12, compiled in 3 s") is None
  assert progress.seen("step  1/10  loss 8.0000  lr 1.00e-03  grad 1.000  tok/s 5") == (
    "step 1/10  loss 8.0000  left ?  study ?"
  )
  now[0] = 8.0  # four steps of two seconds
  assert progress.seen("step  5/10  loss 7.0000  lr 1.00e-03") == "step 5/10  loss 7.0000  left 0:00:10  study 0:00:30"
  progress.start_run(later_steps=0)  # the first run diverged at step 5: no step of it is left
  now[0] = 100.0  # compiling is no step
  assert progress.seen("step  1/10  loss 8.0000  lr 1.00e-03").endswith("left 0:00:18  study 0:00:18")


def test_a_log_has_a_line_now_and_then():
  """Would catch a log of a line a step, and one that says nothing for hours."""
  now = [0.0]
  progress = StudyProgress(clock=lambda: now[0])
  assert progress.is_due()
  assert not progress.is_due()
  now[0] = EVERY + 1
  assert progress.is_due()
  progress.start_run(later_steps=0)
  assert progress.is_due()
