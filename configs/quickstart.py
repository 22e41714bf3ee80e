"""Joint training of all embedded task kinds with attribute routing, on two CPU cores, in about eight minutes.

  python launch/prepare_data.py
  python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python launch/evaluate.py --workdir=runs/quickstart

./launch/quickstart.sh does all of it. README.md holds the table of what it scores.
"""

import ml_collections

from uni_moe_jax import config


def get_config() -> ml_collections.ConfigDict:
  """Quickstart: 4 layers, width 128, 8 experts, pictures of 32 pixels."""
  c = config.base()
  c.model.update(dict(
      layers=4, width=128, heads=4, hidden=512, image_size=32, patch=8, max_text=64, layer_scale=0.1, remat=False,
      temporal_std=0.5))
  c.model.update(dict(pixel_mean=(0.12,) * 3, pixel_std=(0.3,) * 3))  # of the training pictures
  c.sets.glyph_classes = config.target_set('glyphs/class', family='names')
  c.sets.motions = config.target_set('clips/motion', family='names')
  c.sets.vocabulary = config.target_set('vocabulary', family='words', scoring='sampled', samples=768)
  c.sets.packages = config.target_set('paragraphs/package', family='words')
  c.sets.answers = config.target_set('pairs/label', family='words')

  c.tasks.glyph_class = config.task(
      'image_classification', 'glyphs', batch=64, target_set='glyph_classes', label='class', shift=2)
  c.tasks.glyph_name = config.task(
      'image_retrieval', 'glyphs', batch=96, captions=('{name}',), length=20, shift=2)
  c.tasks.glyph_caption = config.task(
      'image_caption', 'glyphs', batch=32, target_set='vocabulary', captions=('{name}',), length=20, shift=2)
  c.tasks.clip_motion = config.task(
      'video_classification', 'clips', batch=16, target_set='motions', label='motion')
  c.tasks.text = config.task('text_mlm', 'corpus', batch=24, target_set='vocabulary', length=64, picks=12)
  c.tasks.package = config.task(
      'text_classification', 'paragraphs', batch=24, target_set='packages', label='package',
      template='{text} <eot> it is from <spe> . <eot>', length=64)
  c.tasks.continues = config.task(
      'text_classification', 'pairs', batch=16, target_set='answers', label='label',
      template='{text_a} <eot> <spe> , {text_b} <eot>', length=64)
  # Names of clips are never trained on: a known kind on new data, evaluated zero-shot.
  c.tasks.clip_name = config.task('video_retrieval', 'clips', batch=0, captions=('{name}',), length=20)

  for split, where in (('test_characters', 'unseen characters'), ('test_fonts', 'unseen fonts')):
    c.evaluators[f'class, {where}'] = config.evaluator('classification', 'glyph_class', split=split)
    c.evaluators[f'name, {where}'] = config.evaluator('retrieval', 'glyph_name', split=split, number=500)
    c.evaluators[f'caption, {where}'] = config.evaluator('caption', 'glyph_caption', split=split, number=1000)
    c.evaluators[f'motion, {where}'] = config.evaluator('classification', 'clip_motion', split=split)
    c.evaluators[f'zero-shot clip name, {where}'] = config.evaluator(
        'retrieval', 'clip_name', split=split, number=400)
  c.evaluators['masked words'] = config.evaluator('mlm', 'text', split='test')
  c.evaluators['package'] = config.evaluator('classification', 'package', split='test')
  c.evaluators['continues'] = config.evaluator('classification', 'continues', split='test')
  c.optim.update(dict(learning_rate=1e-3, warmup=60))
  c.train.update(dict(steps=500, log_every=20, save_every=100))
  return c
