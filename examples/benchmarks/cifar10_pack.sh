#!/usr/bin/env bash
# The CIFAR-10 pack at full length: trains four base networks from scratch, then halves the MACs of each with L1, with and
# without distillation. Takes a GPU where there is one. The same command continues at the last epoch and skips what is done.
#
#     examples/benchmarks/cifar10_pack.sh CIFAR_ROOT OUT [BASE_EPOCHS] [RECOVERY_EPOCHS]
set -euo pipefail
root=$1 out=$2 base=${3:-160} recovery=${4:-60}
recipes=$(dirname "$0")/../recipes
for model in ${MODELS:-resnet20 resnet56 vgg16_bn mobilenet_v2}; do
    nni-prune-ext run "$recipes/cifar10_base.yaml" --set "data.source=cifar10:$root" --set "model=$model" \
        --set "title=$model on CIFAR-10, dense" --set "train.epochs=$base" --out "$out/$model" --resume
    for distillation in '{weight: 0.5}' null; do
        name=$model-l1; [ "$distillation" = null ] || name+=-distilled
        nni-prune-ext run "$recipes/cifar10_l1.yaml" --set "data.source=cifar10:$root" --set "model.name=$model" \
            --set "model.weights=$out/$model/dense/model.safetensors" --set "recovery.epochs=$recovery" \
            --set "title=$name on CIFAR-10" --set "distillation=$distillation" --out "$out/$name" --resume
    done
done
nni-prune-ext report "$out"/*/ --out "$out/compare.html" --overwrite
