"""The run's configuration: every field with its default. `base()` lists them; `resolve.py` checks them."""

from typing import Any

import ml_collections
from ml_collections import config_dict

PATHS = (('data', 'dir'), ('tokenizer', 'file'), ('tokenizer', 'merges'), ('train', 'init'))  # fields that are paths
FREEZE = 'freeze'
# Temperature groups of the published system; every checkpoint has all of them.
PUBLISHED_TEMPERATURES = ('img_cls', 'video_cls', 'text_mlm', 'text_caption', 'caption', 'mlm', 'retrieve', 'tqa_mlm',
                          'tqa_caption', 'tqa_retrieve', 'downstream')
# Kind → its group there. Text classification shares that of masked language modelling.
PUBLISHED_GROUPS = {
    'image_classification': 'img_cls', 'video_classification': 'video_cls', 'image_caption': 'caption', 'video_caption': 'caption',
    'image_retrieval': 'retrieve', 'video_retrieval': 'retrieve', 'text_mlm': 'text_mlm', 'text_classification': 'text_mlm',
    'vqa': 'downstream'}

_PROMPTS_RULE = (r'prompts/|similarity_weight$', 1.0, 0.0)


def _create(fields: dict[str, Any]) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(fields)


def task(
    kind: str, source: str, *, batch: int, split: str = 'train', weight: float = 1.0, sampling: float = 0.0,
    temperature: str = '',
    target_set: str = '', label: str = '', captions: tuple[str, ...] = (), template: str = '', length: int = 0,
    picks: int = 0, smoothing: float = 0.0, shift: int = 0, head: bool = False,
    subset: float = 1.0, per_class: int = 0, frames: int = 0, crop: str = 'short', flip: bool = False,
    randaugment: float = 0.0, erasing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0) -> ml_collections.ConfigDict:
  """One task: an instance of a kind.

  Args:
    kind: row of `tasks.KINDS` or of `config.kinds`.
    source: name of a data source (`data/sources.py`), 'own:NAME' for your own prepared data, or 'tfds:NAME[/CONFIG]'.
    batch: examples per step over all devices and micro-steps; 0: the task is evaluated only (zero-shot).
    split: of the source.
    weight: factor of the task's loss.
    sampling: how often a 'sampled' mixture draws the task, relative to the others; 0: by its weight, and its loss counts once.
      A 'mixed' one takes every task in every step.
    temperature: temperature group; tasks that name one share a learnt scale. '' = the kind's name.
    target_set: entry of `config.sets`, for kinds with a target family.
    label: column with the class name (kinds that choose among names, label words or answers); of files, a column with a list
      of answers, too; for masked language modelling of files the column of texts ('' = 'text').
    captions: templates over the source's columns, e.g. '{name}', '{name} in {face}'; one is drawn per example.
    template: for kinds read at a slot: '{text} <eot> it is <spe> . <eot>'.
    length: text tokens per example, the final `eot` included (a caption has as many queries again).
    picks: M, at most this many masked tokens per row (masked language modelling), or answers per question.
    smoothing: label smoothing.
    shift: random translation of pictures in training, pixels (sources in memory).
    subset: share of the training examples that are used, chosen by seed and example; of every class its share, where classes
      are known beforehand (not of TFDS's data). A smaller share is part of a larger one.
    per_class: this many training examples of every class instead; 0: all.
    head: adds a linear head, which starts at zero, to the similarity with the target set's entries (one task at most).
    frames: T, that the model sees of a clip (sources in files); one of each of T equal parts of the clip.
    crop: how pictures and clips of files are cut: short (the short side gets the model's size, then a window) | area (a random
      part of 8–100 % of the area; evaluated in the middle of 256/224 of the size) | jitter (short, of a side between 256/224
      and 320/224; published for clips).
    flip: mirror half of the pictures and clips of files in training.
    randaugment: magnitude of RandAugment of pictures of files, 0…10; published: 9; 0 = off.
    erasing: how often a rectangle of a picture of files becomes noise.
    mixup, cutmix: α of the share with which neighbours of a batch are blended or cut into each other, their classes too; 0 = off;
      with both on, each in half of the cases.
  """
  return _create(dict(
      kind=kind, source=source, split=split, batch=batch, weight=weight, sampling=sampling, temperature=temperature,
      target_set=target_set, label=label, captions=captions, template=template, length=length, picks=picks,
      smoothing=smoothing, shift=shift, head=head,
      subset=subset, per_class=per_class, frames=frames, crop=crop, flip=flip, randaugment=randaugment, erasing=erasing,
      mixup=mixup, cutmix=cutmix))


def target_set(
    values: str | tuple[str | tuple[str, ...], ...], *, family: str, scoring: str = 'exact', samples: int = 0,
    length: int = 16, label_prompts: bool = False) -> ml_collections.ConfigDict:
  """Texts that serve as the answer space of tasks.

  Args:
    values: the texts themselves; 'SOURCE/column' (the classes of that column: 'glyphs/class', 'own:pets/breed'); 'file:PATH' (a
      file of class names, data/pipeline/class_names.py, relative to `data.dir`); or 'vocabulary' (every word id). An entry may be a
      tuple instead of a text: what the source calls the class, then its name and synonyms.
    family: target family, 'names' or 'words' (or one of `config.families`).
    scoring: 'exact', or 'sampled' (vocabulary only): in training, the step's positives and a uniform sample.
    samples: K, size of the sampled vocabulary, positives included.
    length: longest text in tokens, `eot` included; longer ones are an error.
    label_prompts: every entry gets a learnt token after its `spe`, zero at first: the same for all, but a key more.
  """
  return _create(dict(values=values, family=family, scoring=scoring, samples=samples, length=length,
                      label_prompts=label_prompts))


def evaluator(
    kind: str, task_name: str, *, split: str, number: int = 0, batch: int = 128, beams: int = 1,
    penalty: float = 0.0, answers: str = '', views: int = 1, crops: int = 1) -> ml_collections.ConfigDict:
  """One evaluation with a fixed protocol; see `eval/evaluators.py`.

  Args:
    kind: classification | retrieval | mlm | caption | glue | vqa.
    task_name: entry of `config.tasks`, trained or not (batch 0): what is asked, of which source.
    split: that is evaluated.
    number: retrieval in memory: candidates, with distinct texts; others, and of files: examples, 0 = all.
    batch: examples encoded at once.
    beams: caption: hypotheses that are kept of each picture; 1: greedy.
    penalty: caption: scores are divided by (words + 1)^penalty at the end.
    answers: caption: entry of `config.sets` whose texts are the only captions that may be given; '' = any words. No task
      needs to use the set.
    views, crops: classification of clips of files: probabilities are averaged over so many views in time × crops along the
      long side.
  """
  return _create(dict(kind=kind, task=task_name, split=split, number=number, batch=batch, beams=beams, penalty=penalty,
                      answers=answers, views=views, crops=crops))


def base() -> ml_collections.ConfigDict:
  """Every field of a run and its default."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.model = _create(dict(
      layers=12, width=192, heads=3, hidden=768,  # L, D, N, F
      image_size=224, patch=16, channels=3,       # pixels, pixels, colours
      max_frames=8,                # rows of the temporal table
      max_text=512,                # rows of the position table
      pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
      video_mean=(), video_std=(),  # of clips (more than one frame); () = as pictures. Published: 0.5, pictures ImageNet's
      spatial='sincos',            # sincos (computed) | stored (a parameter that starts so; published, frozen) | learnt
      visual_type=False,           # a learnt row added to visual tokens (some published checkpoints)
      position_init='normal',      # of text: normal | sincos (then learnt; neighbours start alike)
      position_std=0.02,           # initial std of the position rows
      query_key_init='independent',  # independent | equal (attention starts among neighbours: short runs)
      # A patch of a clip comes with its change since the frame before, through a kernel of its own. Without it the direction of
      # a motion is a product of time, place and light, which an hour of training did not find (docs/embedded.md).
      frame_differences=False,
      temporal_std=0.02,           # initial std of the temporal rows
      prefix='<spe>',              # <spe>: LN(Word[spe]) | a word, embedded as a text of length 1
      layer_scale=1e-3,            # initial LayerScale; small models want about 0.1
      drop_path=0.0,               # stochastic depth
      temperature=0.07,            # initial τ of every temperature group
      prompts=0,                   # deep prompts per layer
      prompt_sides='shared',       # by inputs and targets | separate (tables) | inputs (targets have none)
      prefix_prompts=0,            # learnt tokens after the prefix spe, on the sides of prompt_sides
      spe_bias=False,              # a learnt row added to every spe
      temperatures=(),             # groups that exist beside those of the trained tasks (a converted checkpoint's)
      dtype='float32',             # of products: float32 | bfloat16; parameters stay float32
      remat=True,                  # recompute blocks in the backward pass: less memory, a third more work
  ))
  c.moe = _create(dict(
      router='attribute',          # dense | attribute | task | modality (kernels merge) | token | context (tokens are dispatched)
      num_experts=8,               # E
      top_k=2,                     # K kept, renormalised to sum 1
      noise_std=1.0,               # training noise of gate logits, divided by E
      # all | odd (layers 0, 2, 4 …) | four | none | tuple of layer indices; two types, so that either can be assigned
      placement=config_dict.FieldReference('all', field_type=object),
      parts=('attention', 'ffn'),  # projections with experts
      # Of routers that look at tokens:
      capacity=0.0,                # factor f: in training an expert takes ⌈f · K · tokens / E⌉ tokens of an array; 0 = exact
      # how experts multiply: auto (by device) | xla (auto without its kernels) | loop | buffers | ragged | megablox | triton
      grouped='auto',
      balance_loss=0.0, importance_loss=0.0, z_loss=0.0,  # factors of auxiliary losses (moe/token_routers.py)
  ))
  c.tokenizer = _create(dict(
      kind='sentencepiece',        # sentencepiece (learnt from the run's text) | clip (published; extra `clip`)
      vocab_size=2000,             # V, special pieces included; clip: not used, V follows from the merges
      fewer=False,                 # sentencepiece: take what pieces there are where texts give no vocab_size; False: an error
      file='',                     # sentencepiece: a trained model, such as a run's tokenizer.model; '' trains one
      merges='',                   # clip: path of bpe_simple_vocab_16e6.txt.gz, or of another file of that format
  ))
  c.data = _create(dict(
      dir='~/.cache/uni_moe_jax',  # prepared data; see launch/prepare_data.py
      max_bad_fraction=0.01,       # of the examples read from files; more that cannot be used stop the run
      mask_specials=False,         # random words of masked language modelling may be special tokens; published: True
  ))
  # What is known of data that is not here: launch/preflight.py reads it, training does not.
  c.declared = _create(dict(
      entries=_create({}),         # {set: ((tokens, entries), …)}: how many entries have how many tokens, `eot` included
      frames=_create({}),          # {task: T}: frames of a clip of a source in memory; others have their task's, or 1
  ))
  c.kinds = _create({})            # own rows: {name: {inputs: (('visual', 'full'), …), target, readout, router_task}}
  c.families = _create({})         # own target families: {name: (four task bits)}
  c.sets = _create({})             # {name: target_set(…)}
  c.tasks = _create({})            # {name: task(…)}
  c.optim = _create(dict(
      learning_rate=1e-3, warmup=200,  # warmup in steps
      # cosine | constant | published: its first update has rate 0, its cosine is not clamped and rises again past the end
      schedule='cosine',
      final=0.0,                   # learning rate at the end, as a fraction of the peak
      b1=0.9, b2=0.95, eps=1e-6,   # AdamW
      clip=1.0,                    # global norm; 0 = off
      gate_factor=1.0,             # of the learning rate of every router, on top of its rule
      layer_decay=1.0,             # factor of the learning rate per layer below the last, embeddings the lowest; 1 = off
      # What happens to a parameter or expert that a step does not use. update: gradient zero (moments decay, weight decay
      # applies) | settonone, zerograd: left alone, as by PyTorch's two ways to reset gradients (train/adam.py)
      without_gradient='update',
      # (pattern, factor of the learning rate, weight decay) or (pattern, 'freeze'): the first match wins, and every
      # parameter must match one. Patterns are searched in paths such as 'encoder/blocks/block0/ffn_in/kernel'.
      rules=(
          (r'scale[12]$|log_scale', 1.0, 0.0),
          (r'_router/', 1.0, 0.0),
          _PROMPTS_RULE,
          (r'embed/(word|position|type|visual_type|temporal|spatial)$', 1.0, 0.0),
          (r'norm\d?/|bias$', 1.0, 0.0),
          (r'.*', 1.0, 0.05),
      ),
  ))
  c.train = _create(dict(
      init='',                     # workdir of the run whose newest parameters this one starts from; '' = fresh ones
      steps=1000,
      mixture='mixed',             # mixed: every task in every step | sampled: one task a step, by weight
      accum=1,                     # micro-steps; target sets are encoded once for all of them
      encode_all_sets=False,       # also sets that no task of the step names (published)
      contrastive='mean',          # of both directions of retrieval: mean | sum (published)
      twins='masked',              # equal texts of a retrieval batch: masked (no negatives) | negatives (published)
      ema=0.0,                     # decay of averaged parameters, used by evaluation when > 0
      log_every=20,                # steps
      save_every=200,              # steps
      keep=2,                      # newest checkpoints kept
      keep_best='',                # and that with the lowest of this logged loss (loss/total, loss/<task>); '' = none
      max_bad_steps=10,            # steps in a row with a loss that is not finite, before the run stops
      watchdog=600.0,              # seconds for a batch, a step or a save, before the run ends as hung; 0 = off
      interference_every=0,        # steps between estimates of task interference (analysis/interference_hook.py); 0 = off
      # pattern, searched in paths as optim.rules are; of models with more than 7 layers, in every fourth layer (3, 7, 11 …)
      interference_parameters=r'ffn_out/kernel$',
  ))
  c.evaluators = _create({})       # {name: evaluator(…)}
  c.mesh = _create(dict(replica=1, data=-1, expert=1, model=1, fsdp=False))  # one axis may be -1 (inferred)
  return c


def completed(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config that an earlier version of this package wrote, with the defaults of the fields that it did not know."""
  def fill(known, defaults):
    for name, value in defaults.items():
      if name not in known:
        known[name] = value
      elif isinstance(value, ml_collections.ConfigDict) and len(value):
        fill(known[name], value)

  with c.unlocked():
    rules = base().optim.rules
    if 'prefix_prompts' not in c.model and c.optim.rules == tuple(r for r in rules if r != _PROMPTS_RULE) and not (
        c.model.get('prompts') or any(t.get('head') for t in c.tasks.values())):
      c.optim.rules = rules  # the rule that these have got since then matches none of its parameters
    if 'prompts' not in c.model and c.model.prefix == 'spe':
      c.model.prefix = '<spe>'  # so it was written before a word could have this name
    fill(c, base())
    for entries, defaults in ((c.tasks, task('', '', batch=0)), (c.sets, target_set('', family='')),
                              (c.evaluators, evaluator('', '', split=''))):
      for entry in entries.values():
        fill(entry, defaults)
  return c
