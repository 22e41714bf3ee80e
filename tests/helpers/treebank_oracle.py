"""Writes the output of the COCO caption toolkit's own tokenizer and metrics into tests/golden/treebank.json.

  pip download pycocoevalcap==1.2 --no-deps && unzip -d TOOLKIT pycocoevalcap-1.2-*.whl
  python tests/helpers/treebank_oracle.py TOOLKIT

It runs java. The texts are those of the file; to add one, add it there with any words, and run this.
"""

import json
import pathlib
import sys

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'treebank.json'
_SEPARATOR = 'xx'  # between texts: the program's choice for a last letter depends on the line after it


def main(toolkit: str) -> None:
  sys.path.insert(0, toolkit)
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  def words(texts: list[str]) -> list[str]:
    captions = {i: [{'caption': text}, {'caption': _SEPARATOR}] for i, text in enumerate(texts)}
    # Its metrics split at any space.
    return [' '.join(tokenized[0].split()) for tokenized in PTBTokenizer().tokenize(captions).values()]

  golden = json.loads(GOLDEN.read_text())
  texts = [text for text, _ in golden['texts']]
  golden['texts'] = [list(pair) for pair in zip(texts, words(texts))]
  scored = golden['scored']
  predicted = {i: [text] for i, text in enumerate(words(scored['predictions']))}
  truth = {i: words(several) for i, several in enumerate(scored['references'])}
  scored['BLEU-4'] = Bleu(4).compute_score(truth, predicted, verbose=0)[0][3]
  scored['CIDEr-D'] = Cider().compute_score(truth, predicted)[1].tolist()
  scored['ROUGE-L'] = Rouge().compute_score(truth, predicted)[1].tolist()
  GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
