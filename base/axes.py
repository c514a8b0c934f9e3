"""The shape legend. A tensor's suffix names its axes; the letters mean the same in every room.

B  rows of a batch (a row is one packed sequence)       T  positions in a row, or tokens when flattened
D  model width                                          I  input features of a linear
O  output features of a linear                          V  vocabulary
N  experts in a library                                 K  experts chosen for a token
E  experts of a training run (one loss term each)       R  rank slots: the ranks of all experts side by side
S  sites (adapted linears)                              H  attention heads
A  anchors of thoughts                                  M  named loss terms
P  entries of a flat parameter vector                   C  answer choices
"""
