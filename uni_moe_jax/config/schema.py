"""The run's configuration: every field with its default. `base()` lists them; `resolve.py` checks them."""

from typing import Any

import ml_collections
from ml_collections import config_dict

PATHS = (('data', 'dir'), ('tokenizer', 'path'), ('tokenizer', 'merges_path'), ('train', 'init'))  # fields that are paths
FREEZE = 'freeze'
# Temperature groups of the published system; every checkpoint has all of them.
PUBLISHED_TEMPERATURES = ('img_cls', 'video_cls', 'text_mlm', 'text_caption', 'caption', 'mlm', 'retrieve', 'tqa_mlm',
                          'tqa_caption', 'tqa_retrieve', 'downstream')
# TaskType → its group there. Text classification shares that of masked language modelling.
PUBLISHED_GROUPS = {
    'image_classification': 'img_cls', 'video_classification': 'video_cls', 'image_caption': 'caption', 'video_caption': 'caption',
    'image_retrieval': 'retrieve', 'video_retrieval': 'retrieve', 'text_mlm': 'text_mlm', 'text_classification': 'text_mlm',
    'vqa': 'downstream'}

_PROMPTS_RULE = (r'prompts/|similarity_weight$', 1.0, 0.0)


def _create(fields: dict[str, Any]) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(fields)


def task(
    type: str, source: str, *, batch_size: int, split: str = 'train', loss_weight: float = 1.0, sampling_weight: float = 0.0,
    temperature: str = '',
    target_set: str = '', label_column: str = '', caption_templates: tuple[str, ...] = (), template: str = '', max_len: int = 0,
    max_predictions: int = 0, label_smoothing: float = 0.0, max_shift: int = 0, linear_head: bool = False,
    train_fraction: float = 1.0, shots: int = 0, num_frames: int = 0, crop: str = 'resize_crop', random_flip: bool = False,
    randaugment: float = 0.0, random_erasing: float = 0.0, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> ml_collections.ConfigDict:
  """One task: an instance of a type.

  Args:
    type: row of `task_types.TASK_TYPES` or of `config.task_types`.
    source: name of a data source (`data/sources.py`), 'own:NAME' for your own prepared data, or 'tfds:NAME[/CONFIG]'.
    batch_size: examples per step over all devices and micro-steps; 0: the task is evaluated only (zero-shot).
    split: of the source.
    loss_weight: factor of the task's loss.
    sampling_weight: how often a 'one_task' mixture draws the task, relative to the others; 0: by its loss_weight, and its loss counts once.
      An 'all_tasks' one takes every task in every step.
    temperature: temperature group; tasks that name one share a learnt scale. '' = the kind's name.
    target_set: entry of `config.target_sets`, for kinds with a target family.
    label_column: column with the class name (kinds that choose among names, label_column words or answers); of files, a column with a list
      of answers, too; for masked language modelling of files the column of texts ('' = 'text').
    caption_templates: templates over the source's columns, e.g. '{name}', '{name} in {face}'; one is drawn per example.
    template: for kinds read at a slot: '{text} <eot> it is <spe> . <eot>'.
    max_len: text tokens per example, the final `eot` included (a caption has as many queries again).
    max_predictions: M, at most this many masked tokens per row (masked language modelling), or answers per question.
    label_smoothing: label_column label_smoothing.
    max_shift: random translation of pictures in training, pixels (sources in memory).
    train_fraction: share of the training examples that are used, chosen by seed and example; of every class its share, where classes
      are known beforehand (not of TFDS's data). A smaller share is part of a larger one.
    shots: this many training examples of every class instead; 0: all.
    linear_head: adds a linear linear_head, which starts at zero, to the similarity with the target set's entries (one task at most).
    num_frames: T, that the model sees of a clip (sources in files); one of each of T equal parts of the clip.
    crop: how pictures and clips of files are cut: short (the short side gets the model's size, then a window) | area (a random
      part of 8–100 % of the area; evaluated in the middle of 256/224 of the size) | jitter (short, of a side between 256/224
      and 320/224; published for clips).
    random_flip: mirror half of the pictures and clips of files in training.
    randaugment: magnitude of RandAugment of pictures of files, 0…10; published: 9; 0 = off.
    random_erasing: how often a rectangle of a picture of files becomes noise.
    mixup_alpha, cutmix_alpha: α of the share with which neighbours of a batch_size are blended or cut into each other, their classes too; 0 = off;
      with both on, each in half of the cases.
  """
  return _create(dict(
      type=type, source=source, split=split, batch_size=batch_size, loss_weight=loss_weight, sampling_weight=sampling_weight, temperature=temperature,
      target_set=target_set, label_column=label_column, caption_templates=caption_templates, template=template, max_len=max_len, max_predictions=max_predictions,
      label_smoothing=label_smoothing, max_shift=max_shift, linear_head=linear_head,
      train_fraction=train_fraction, shots=shots, num_frames=num_frames, crop=crop, random_flip=random_flip, randaugment=randaugment, random_erasing=random_erasing,
      mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha))


def target_set(
    entries: str | tuple[str | tuple[str, ...], ...], *, family: str, softmax: str = 'full', num_sampled: int = 0,
    max_len: int = 16, label_prompts: bool = False) -> ml_collections.ConfigDict:
  """Texts that serve as the answer space of tasks.

  Args:
    entries: the texts themselves; 'SOURCE/column' (the classes of that column: 'glyphs/class', 'own:pets/breed'); 'file:PATH' (a
      file of class names, data/pipeline/class_names.py, relative to `data.dir`); or 'vocabulary' (every word id). An entry may be a
      tuple instead of a text: what the source calls the class, then its name and synonyms.
    family: target family, 'names' or 'words' (or one of `config.target_families`).
    softmax: 'full', or 'sampled' (vocabulary only): in training, the step's positives and a uniform sample.
    num_sampled: K, size of the sampled vocabulary, positives included.
    max_len: longest text in tokens, `eot` included; longer ones are an error.
    label_prompts: every entry gets a learnt token after its `spe`, zero at first: the same for all, but a key more.
  """
  return _create(dict(entries=entries, family=family, softmax=softmax, num_sampled=num_sampled, max_len=max_len,
                      label_prompts=label_prompts))


def evaluator(
    type: str, task_name: str, *, split: str, num_examples: int = 0, batch_size: int = 128, beam_size: int = 1,
    length_penalty: float = 0.0, constrain_to: str = '', num_views: int = 1, num_crops: int = 1) -> ml_collections.ConfigDict:
  """One evaluation with a fixed protocol; see `eval/evaluators.py`.

  Args:
    type: classification | retrieval | mlm | caption | glue | vqa.
    task_name: entry of `config.tasks`, trained or not (batch_size 0): what is asked, of which source.
    split: that is evaluated.
    num_examples: retrieval in memory: candidates, with distinct texts; others, and of files: examples, 0 = all.
    batch_size: examples encoded at once.
    beam_size: caption: hypotheses that are kept of each picture; 1: greedy.
    length_penalty: caption: scores are divided by (words + 1)^length_penalty at the end.
    constrain_to: caption: entry of `config.target_sets` whose texts are the only captions that may be given; '' = any words. No task
      needs to use the set.
    num_views, num_crops: classification of clips of files: probabilities are averaged over so many num_views in time × num_crops along the
      long side.
  """
  return _create(dict(type=type, task=task_name, split=split, num_examples=num_examples, batch_size=batch_size, beam_size=beam_size, length_penalty=length_penalty,
                      constrain_to=constrain_to, num_views=num_views, num_crops=num_crops))


def base() -> ml_collections.ConfigDict:
  """Every field of a run and its default."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.model = _create(dict(
      num_layers=12, width=192, num_heads=3, mlp_dim=768,  # L, D, N, F
      image_size=224, patch_size=16, channels=3,       # pixels, pixels, colours
      max_num_frames=8,                # rows of the temporal table
      max_text_len=512,                # rows of the position table
      pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
      video_mean=(), video_std=(),  # of clips (more than one frame); () = as pictures. Published: 0.5, pictures ImageNet's
      posemb='sincos2d',            # sincos2d (computed) | frozen (a parameter that starts so; published) | learned
      modality_embedding=False,           # a learnt row added to visual tokens (some published checkpoints)
      text_posemb_init='normal',      # of text: normal | sincos (then learnt; neighbours start alike)
      text_posemb_std=0.02,           # initial std of the position rows
      mimetic_init=False,  # independent | equal (attention starts among neighbours: short runs)
      # A patch of a clip comes with its change since the frame before, through a kernel of its own. Without it the direction of
      # a motion is a product of time, place and light, which an hour of training did not find (docs/results/embedded.md).
      frame_differences=False,
      temporal_posemb_std=0.02,           # initial std of the temporal rows
      readout_token='<spe>',              # <spe>: LN(Word[spe]) | a word, embedded as a text of length 1
      layer_scale_init=1e-3,            # initial LayerScale; small models want about 0.1
      drop_path=0.0,               # stochastic depth
      temperature_init=0.07,            # initial τ of every temperature_init group
      num_deep_prompts=0,                   # deep prompts per layer
      prompt_sharing='shared',       # by inputs and targets | separate (tables) | inputs (targets have none)
      num_prefix_prompts=0,            # learnt tokens after the readout_token spe, on the sides of prompt_sharing
      spe_bias=False,              # a learnt row added to every spe
      extra_temperature_groups=(),             # groups that exist beside those of the trained tasks (a converted checkpoint's)
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
      sublayers=('attention', 'mlp'),  # projections with experts
      # Of routers that look at tokens:
      capacity_factor=0.0,                # factor f: in training an expert takes ⌈f · K · tokens / E⌉ tokens of an array; 0 = exact
      # how experts multiply: auto (by device) | xla (auto without its kernels) | loop | buffers | ragged | megablox | triton
      gmm='auto',
      balance_loss_weight=0.0, importance_loss_weight=0.0, z_loss_weight=0.0,  # factors of auxiliary losses (moe/token_routers.py)
  ))
  c.tokenizer = _create(dict(
      type='sentencepiece',        # sentencepiece (learnt from the run's text) | clip (published; extra `clip`)
      vocab_size=2000,             # V, special pieces included; clip: not used, V follows from the merges_path
      allow_smaller_vocab=False,                 # sentencepiece: take what pieces there are where texts give no vocab_size; False: an error
      path='',                     # sentencepiece: a trained model, such as a run's tokenizer.model; '' trains one
      merges_path='',                   # clip: path of bpe_simple_vocab_16e6.txt.gz, or of another path of that format
  ))
  c.data = _create(dict(
      dir='~/.cache/uni_moe_jax',  # prepared data; see launch/prepare_data.py
      max_corrupt_fraction=0.01,       # of the examples read from files; more that cannot be used stop the run
      random_special_tokens=False,         # random words of masked language modelling may be special tokens; published: True
  ))
  # What is known of data that is not here: launch/preflight.py reads it, training does not.
  c.preflight = _create(dict(
      target_lengths=_create({}),  # {set: ((tokens, entries), …)}: how many entries have how many tokens, `eot` included
      num_frames=_create({}),      # {task: T}: frames of a clip of a source in memory; others have their task's, or 1
  ))
  c.task_types = _create({})            # own rows: {name: {inputs: (('visual', 'full'), …), target, readout, router_task}}
  c.target_families = _create({})         # own target families: {name: (four task bits)}
  c.target_sets = _create({})             # {name: target_set(…)}
  c.tasks = _create({})            # {name: task(…)}
  c.optim = _create(dict(
      learning_rate=1e-3, warmup_steps=200,  # warmup_steps in steps
      # cosine | constant | published: its first update has rate 0, its cosine is not clamped and rises again past the end
      schedule='cosine',
      final_lr_fraction=0.0,                   # learning rate at the end, as a fraction of the peak
      b1=0.9, b2=0.95, eps=1e-6,   # AdamW
      grad_clip_norm=1.0,                    # global norm; 0 = off
      router_lr_multiplier=1.0,             # of the learning rate of every router, on top of its rule
      layerwise_lr_decay=1.0,             # factor of the learning rate per layer below the last, embeddings the lowest; 1 = off
      # What happens to a parameter or expert that a step does not use. update: gradient zero (moments decay, weight decay
      # applies) | settonone, zerograd: left alone, as by PyTorch's two ways to reset gradients (train/adam.py)
      unused_params='update',
      # (pattern, factor of the learning rate, weight decay) or (pattern, 'freeze'): the first match wins, and every
      # parameter must match one. Patterns are searched in paths such as 'encoder/blocks/block0/ffn_in/kernel'.
      param_groups=(
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
      mixture='all_tasks',             # all_tasks: every task in every step | one_task: one task a step, by weight
      grad_accum_steps=1,                     # micro-steps; target sets are encoded once for all of them
      encode_all_sets=False,       # also sets that no task of the step names (published)
      contrastive_reduction='mean',          # of both directions of retrieval: mean | sum (published)
      mask_duplicate_texts=True,              # equal texts of a retrieval batch: masked (no negatives) | negatives (published)
      ema_decay=0.0,                     # decay of averaged parameters, used by evaluation when > 0
      log_every=20,                # steps
      checkpoint_every=200,              # steps
      max_to_keep=2,                      # newest checkpoints kept
      best_metric='',                # and that with the lowest of this logged loss (loss/total, loss/<task>); '' = none
      max_nonfinite_steps=10,            # steps in a row with a loss that is not finite, before the run stops
      hang_timeout=600.0,              # seconds for a batch, a step or a save, before the run ends as hung; 0 = off
      interference_every=0,        # steps between estimates of task interference (analysis/interference_hook.py); 0 = off
      # pattern, searched in paths as optim.param_groups are; of models with more than 7 layers, in every fourth layer (3, 7, 11 …)
      interference_parameters=r'ffn_out/kernel$',
  ))
  c.evaluators = _create({})       # {name: evaluator(…)}
  c.mesh = _create(dict(replica=1, data=-1, expert=1, model=1, fsdp=False))  # one axis may be -1 (inferred)
  return c
