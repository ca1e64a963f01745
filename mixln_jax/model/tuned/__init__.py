"""What is tuned for one platform, out of the model's reading order.

The model calls a door, a function that picks by platform between a plain form and a tuned one. The plain form says what
is computed and stands beside the door; a test holds the two to the same values and gradients. docs/tuned.md has what
each tuned form is worth.

  door                                     plain form                       tuned form
  model/product.py `multiply`              `jnp.einsum`                     `product.py`: a CPU's weight gradient
  model/loss.py `next_token_loss`          optax's cross entropy            `loss.py`: logits in chunks, one pass
  model/attention_kernels.py               `jax.nn.dot_product_attention`   `attention_blocks.py`: a CPU's
    `self_attention`                                                        `attention_splash.py`: a TPU's kernel
  model/residual.py `Sublayer.branch`      f(x)                             `fence.py`: a TPU's norms in a mixture,
    and `Sublayer.apply`                                                    its sums over several streams
  training/optimizer.py `make_optimizer`   optax's clip and Adam            `training/tuned.py`
"""
