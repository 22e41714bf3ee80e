"""Names of the metrics that evaluators measure, for the choice of the best checkpoint."""

RECALLS = (1, 5, 10)
_METRICS = {  # by evaluator type
    'classification': ('top-1', 'top-5', 'balanced_accuracy'),
    'retrieval': tuple(f'{direction}_R@{k}' for k in RECALLS for direction in ('{0}2t', 't2{0}')),
    'mlm': ('accuracy', 'perplexity'),
    'caption': ('exact_match', 'BLEU-4', 'ROUGE-L', 'CIDEr-D', 'word F1'),
    'glue': ('accuracy', 'F1', 'Matthews'),
    'vqa': ('soft score', 'exact_match'),
}


def modality(task_type: str) -> str:
  """The letter of what a retrieval task type searches: v for videos, i for images."""
  return 'v' if task_type.startswith('video') else 'i'


def metric_names(evaluator_type: str, task_type: str) -> tuple[str, ...]:
  """All metrics of an evaluator; of few targets it measures some of them."""
  return tuple(name.format(modality(task_type)) for name in _METRICS.get(evaluator_type, ()))


def is_measured(metric: str, num_targets: int) -> bool:
  """Whether an evaluator measures one of its metrics among so many targets."""
  return num_targets > 10 if metric == 'top-5' else num_targets == 2 if metric in ('F1', 'Matthews') else True


def lower_is_better(metric: str) -> bool:
  """Whether the best value of a metric is its lowest: of losses and perplexities, also under their names in the log."""
  return metric.startswith('loss/') or metric.endswith('perplexity')
