#!/usr/bin/env bash
# ResNet-56 on CIFAR-10, every registered method at half of the MACs, beside the dense network trained as long.
#
#     examples/benchmarks/resnet56_cifar10.sh WEIGHTS CIFAR_ROOT OUT [EPOCHS]
#
# WEIGHTS are those of a dense ResNet-56 normalised with the ImageNet constants; EPOCHS is 2 for the small run of the README
# and 100 for the full one. The same command continues a broken run at its last epoch and skips what is done.
set -euo pipefail
weights=$1 root=$2 out=$3 epochs=${4:-2}
for method in ${METHODS:-l1 l2 fpgm taylor random}; do
    nni-prune-ext prune resnet56 --weights "$weights" --data "cifar10:$root" --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \
        --method "$method" --target macs=0.5 --multiple 8 --epochs "$epochs" --learning-rate 0.02 --precision bf16 --channels-last \
        --out "$out/$method" --resume
done
