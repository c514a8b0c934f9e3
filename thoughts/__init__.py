"""Floor 3: thoughts before each token (Quiet-STaR) for any causal language model of transformers.

types.py        the nouns: anchors, thoughts, prefix, loss; the axes of this room
config.py       every number of the method, presets, curriculum
parameters.py   START, END and the mixing head        policy.py    what is trained, as tensors
attention.py    branches through an unmodified model  storage.py   a rollout's keys and values, 16, 8 or 4 bit
calibration.py  by what few bits are rounded          flips.py     experts chosen otherwise than in the rollout
prefix.py       the ordinary pass                     branch.py    the branch pass that everything shares
anchors.py      which positions think
rollout.py      sampling, captured on a GPU           gradient.py  the loss and its gradient, in chunks
objective.py    rewards, advantages, ratios           stats.py     the dashboard's sums
baseline.py     the yardstick of RLP                  scoring.py   thoughts' worth, without gradients
files.py        START, END and head on disk
"""
