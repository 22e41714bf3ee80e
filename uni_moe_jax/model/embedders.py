"""Embedders of words and patches, and the tokens before them: the prefix `spe`, then prompts.

Text: word (and its neighbors) + position + type, then LayerNorm. Visual: patch projection + spatial + temporal, then
the *same* LayerNorm. An image is a video of one frame. Patches are reshaped and multiplied, not convolved: on CPU the
gradient of a convolution is ten times slower.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uni_moe_jax.kernels import projection
from uni_moe_jax.model.prompts import TokenPrompts
from uni_moe_jax.model.sequences import NO_WORD, InputSequence
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.stem import conv_stem, stem_params
from uni_moe_jax.moe.layers import LayerNorm, param, xavier_uniform
from uni_moe_jax.parallel import sharding

EMBED_STD = 0.02


def _waves(x: np.ndarray, n: int) -> np.ndarray:
  """[sin(x w), cos(x w)], w_k = 10000^(-k/n): coordinates [S] → [S, 2n]."""
  angle = x[:, None] * 10000.0 ** (-np.arange(n) / n)[None]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_table(side: int, width: int, scale: float = 1.0) -> np.ndarray:
  """Fixed 2-D positions [side², D], D divisible by 4.

  [sin(r w), cos(r w), sin(c w), cos(c w)], w_k = 10000^(-k/(D/4)), of row r and column c, both multiplied by `scale`
  (160/224 where a 160-px model continues at 224).
  """
  r, c = np.multiply(np.divmod(np.arange(side * side), side), scale)
  return np.concatenate([_waves(r, width // 4), _waves(c, width // 4)], axis=1).astype(np.float32)


def patchify(pixels: jax.Array, patch: int) -> jax.Array:
  """[B, T, H, W, C] → [B, T · (H/p)(W/p), p · p · C], tokens and pixels in row-major order."""
  B, T, H, W, C = pixels.shape
  x = pixels.reshape(B, T, H // patch, patch, W // patch, patch, C)
  return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T * (H // patch) * (W // patch), patch * patch * C)


class Embed(nn.Module):
  """Word, position, type, patch, spatial and temporal tables under one LayerNorm."""
  spec: ModelSpec
  mesh: Mesh | None = None

  def setup(self):
    s = self.spec
    normal = nn.initializers.normal(EMBED_STD)

    def table(name, rows, axis, init=normal):
      values = param(self, name, init, {axis: rows, 'embed': s.width})
      return sharding.as_used(values, (axis, 'embed'), self.mesh)

    self.word = table('word', s.vocab_size, 'vocab')
    self.position = table('position', s.max_text_len, 'position')
    # Two rows as published, of which only row 0 is used, so that a converted checkpoint keeps its table.
    self.type = table('type', 2, 'type')
    if s.word_neighbors:
      rows = 2 * s.word_neighbors * s.width
      self.neighbors = table('neighbors', rows, 'feature', xavier_uniform(rows, s.width))
    patch_dim = s.patch_size * s.patch_size * s.channels
    if s.stem == 'conv':
      self.stem = stem_params(self, s)
    else:
      self.patch = table('patch', patch_dim, 'patch', xavier_uniform(patch_dim, s.width))
      self.patch_bias = param(self, 'patch_bias', nn.initializers.zeros, {'embed': s.width})
    if s.frame_differences:
      self.difference = table('difference', patch_dim, 'patch', xavier_uniform(patch_dim, s.width))
    self.temporal = table('temporal', s.max_num_frames, 'frame', nn.initializers.normal(s.temporal_posemb_std))
    waves = sincos_table(s.image_size // s.patch_size, s.width, s.posemb_scale)
    if s.posemb == 'sincos2d':
      self.spatial = jnp.asarray(waves)
    else:
      start = normal if s.posemb == 'learned' else lambda key, shape: jnp.asarray(waves)
      self.spatial = table('spatial', s.patches, 'space', start)
    if s.modality_embedding:
      self.visual_type = table('visual_type', 1, 'type')
    if s.spe_bias:
      self.spe_bias = param(self, 'spe_bias', nn.initializers.zeros, {'embed': s.width})
    self.norm = LayerNorm()
    self.prompts = TokenPrompts(s)

  def words(self, ids: jax.Array) -> jax.Array:
    """Rows of the word table, [...] → [..., D]; `spe` with its learned bias if the model has one."""
    x = self.word[ids]
    if self.spec.spe_bias:
      x = x + jnp.where(ids == self.spec.spe_id, 1, 0)[..., None] * jax.lax.broadcast_to_rank(self.spe_bias, x.ndim)
    return x

  def text(self, ids: jax.Array, positions: jax.Array, neighbors: jax.Array | None = None) -> jax.Array:
    """ids [B, S], positions [B, S] and `InputSequence.neighbors` [B, S, 2n] → [B, S, D]."""
    x = self.words(ids) + self.position[positions] + self.type[0][None, None]
    if neighbors is not None:
      words = jnp.where((neighbors == NO_WORD)[..., None], 0, self.words(jnp.maximum(neighbors, 0)))
      x = x + self._project(words.reshape(*ids.shape, -1), self.neighbors)
    return self.norm(x)

  def _project(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    dtype = self.spec.dtype
    return projection.dot(x.astype(dtype), kernel.astype(dtype), kernel, self.spec.product_method(self.mesh))

  def prefix(self) -> jax.Array:
    """The prefix `spe`, [1, 1, D]: LN(Word[spe]) without position and type, or a word as a text."""
    s = self.spec
    if s.prefix_word is None:
      return self.norm(self.words(jnp.full((1, 1), s.spe_id)))
    return self.text(jnp.full((1, 1), s.prefix_word), jnp.zeros((1, 1), jnp.int32))

  def front(self, prefix: jax.Array, sequence: InputSequence) -> jax.Array:
    """Tokens before the data, [B, n, D]: the prefix `spe`, then prompts."""
    prefix = jnp.broadcast_to(prefix, (sequence.ids.shape[0], *prefix.shape[1:]))
    return jnp.concatenate([prefix, *self.prompts(sequence)], axis=1)

  def visual(self, pixels: jax.Array, temporal_offset: jax.Array) -> jax.Array:
    """Frames → [B, T · patches, D].

    Args:
      pixels: [B, T, H, W, C], uint8 (scaled to 0…1 and normalized here, so that transfers to the device are bytes) or
        normalized. Videos (T > 1) may have their own constants. With `frame_differences`, the change of a patch since
        the frame before is projected by a second kernel; the first frame, and an image, has none.
      temporal_offset: int32 scalar: first row of the temporal table (random per batch in training, 0 otherwise).
    """
    s, T = self.spec, pixels.shape[1]
    if pixels.dtype == jnp.uint8:
      constants = (T > 1 and s.video_mean) or s.pixel_mean, (T > 1 and s.video_std) or s.pixel_std
      mean, std = (np.reshape(x, (1, 1, 1, 1, s.channels)) for x in constants)
      pixels = (pixels.astype(jnp.float32) / 255 - mean.astype(np.float32)) / std.astype(np.float32)
    if s.stem == 'conv':
      x = conv_stem(pixels, self.stem, s.dtype, s.product_method(self.mesh))
    else:
      x = self._project(patchify(pixels, s.patch_size), self.patch) + self.patch_bias[None, None]
    if s.frame_differences and T > 1:
      change = pixels - jnp.concatenate([pixels[:, :1], pixels[:, :-1]], axis=1)  # 0 in the first frame
      x = x + self._project(patchify(change, s.patch_size), self.difference)
    frames = jax.lax.dynamic_slice_in_dim(self.temporal, temporal_offset, T)
    position = (frames[:, None] + self.spatial[None]).reshape(1, T * s.patches, s.width)
    if s.modality_embedding:
      position = position + self.visual_type[None]
    return self.norm(x + position)
