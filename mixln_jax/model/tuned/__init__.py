"""Code that is tuned for one platform, kept apart so that the model reads without it.

The model calls an entry point, a function that picks the plain form or a tuned form by platform. The plain form defines
the result and stands beside the entry point; tests check that both give the same values and gradients. docs/tuned.md
says how much each tuned form gains.

  entry point                              plain form                       tuned form
  model/product.py `multiply`              `jnp.einsum`                     `product.py`: a CPU's weight gradient
  model/loss.py `next_token_loss`          optax's cross entropy            `loss.py`: logits in chunks, one pass
  model/attention_kernels.py               `jax.nn.dot_product_attention`   `attention_blocks.py`: a CPU's
    `self_attention`                                                        `attention_splash.py`: a TPU's kernel
  model/residual.py `Sublayer.input`       f(x)                             `fence.py`: a TPU's norms in a mixture,
    and `Sublayer.apply`                                                    its sums for learned write weights
  model/residual.py `Sublayer.apply`       N_out, then N_in                 `norm_pair.py`: a TPU's, where N_in is data
  training/optimizer.py `make_optimizer`   optax's clip and Adam            `training/tuned.py`
"""
