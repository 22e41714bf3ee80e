"""Sparse generalist models with conditional mixtures of experts, in JAX and Flax.

Axis letters, everywhere (names, einsums, `# [..]` comments, docstrings):

  B  batch             S  tokens            D  width             F  hidden
  N  heads             H  head dim          E  experts           K  experts kept
  A  condition rows    C  capacity          V  targets           L  layers
  T  frames            M  picked positions
"""

__version__ = '0.4.0'
