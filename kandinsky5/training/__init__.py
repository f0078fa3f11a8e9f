"""Training: one loop for any model, and the losses of flow models.

recipe     the learning rate and the optimizers
muon       one of them
loop       train
flow       flow matching: times, batches, loss
distill    targets of distillation
footage    files: videos and images, their frames at given times
folder     clips and captions of a folder
data       a cache of them, encoded, and batches
clip_loss  what a DiT learns from them, and the loss of held-out clips
finetune   the command: a LoRA, or all weights, from a folder of clips
job        its options, checked
previews   its videos, next to the base model's
report     what it says before and after
modes      precision, attention and memory of a model in training
curves     what a run logs
state      a run on disk
state_folder  likewise, of several processes
spread     what each of several processes computes of a step, and what they tell each other
"""
