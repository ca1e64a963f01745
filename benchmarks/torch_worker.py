"""One trainer of `benchmarks.train_speed`: Hugging Face's LlamaForCausalLM, run by a Python that has torch.

Its argument is JSON: `{"shape": LlamaConfig's fields, "batch": [B, T], "compiled": bool, "dtype": "float32"}`. It has
the protocol of `benchmarks.speed_worker`. It uses fused AdamW, clipping at 1 and SDPA attention; bfloat16 is autocast.
"""

import json
import sys
import time
from typing import Any

import process_memory
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def answer(**values: Any) -> None:
  print(json.dumps(values), flush=True)


def matmul(size: int, dtype: Any) -> float:
  a = torch.randn(size, size, dtype=dtype, device=DEVICE)
  seconds = []
  for _ in range(6):
    wait()
    started = time.perf_counter()
    a @ a
    wait()
    seconds.append(time.perf_counter() - started)
  return 2 * size**3 / min(seconds)


def peak_gb() -> float:
  if DEVICE == "cuda":
    return torch.cuda.max_memory_allocated() / 1e9
  return process_memory.peak_gb()


class Trainer:
  def __init__(self, request: dict[str, Any]):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(**request["shape"], attn_implementation="sdpa", use_cache=False)
    self.model = transformers.LlamaForCausalLM(shape).to(DEVICE).train()
    self.forward = torch.compile(self.model) if request["compiled"] else self.model
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    self.ids = torch.randint(0, shape.vocab_size, request["batch"], device=DEVICE)
    self.dtype = getattr(torch, request["dtype"])

  def step(self) -> Any:
    with torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32):
      loss = self.forward(input_ids=self.ids, labels=self.ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    wait()
    return loss

  def timed(self) -> tuple[float, Any]:
    started = time.perf_counter()
    loss = self.step()
    return time.perf_counter() - started, loss


def main() -> None:
  request = json.loads(sys.argv[1])
  trainer = Trainer(request)
  first, _ = trainer.timed()
  second, _ = trainer.timed()
  if DEVICE == "cpu":
    process_memory.forget_peak()
  answer(
    compile_seconds=first - second,
    device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    versions={"torch": torch.__version__, "transformers": transformers.__version__},
    parameters=sum(p.numel() for p in trainer.model.parameters()),
  )
  for line in sys.stdin:
    request = json.loads(line)
    if "matmul" in request:
      answer(flops_per_second=matmul(request["matmul"], trainer.dtype))
      continue
    timed = [trainer.timed() for _ in range(request["steps"])]
    answer(seconds=[seconds for seconds, _ in timed], peak_gb=peak_gb(), loss=timed[-1][1].item())


if __name__ == "__main__":
  main()
