"""Sentence embeddings from a quantized encoder: tqw quantizes any nn.Module.

python examples/sentence_embeddings.py MODEL_DIR       such as the folder of all-MiniLM-L6-v2
"""

import copy
import sys

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

import tqw
from tqw.calibrate import input_power

(MODEL,) = sys.argv[1:]
SENTENCES = ["a cat sat on the mat", "the dog is in the garden", "prices rose by two percent", "a kitten is on the rug"]

dense, tokenizer = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MODEL)
batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")


@torch.no_grad()
def embed(model):
    mask = batch["attention_mask"][..., None]
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return (hidden * mask).sum(1) / mask.sum(1)


quantized = copy.deepcopy(dense)
statistics = input_power(dense, [batch["input_ids"]])  # what the layers read; a few sentences of the right kind suffice
report = tqw.quantize_model(quantized, tqw.QuantConfig(bits=5, group_size=32), input_power=statistics)
similarity = cosine_similarity(embed(dense), embed(quantized))
print(f"{report.bits_per_weight():.2f} bits per weight; cosine to the float embeddings {similarity.min():.4f} or more")
