"""Small detection models with random weights, as on the hub: Mask2Former, YOLOS, OWLv2 and Grounding DINO."""

from pathlib import Path

import torch

from tests.tiny_clip import save_tiny_tokenizer, vocabulary

LABELS = {0: "cat", 1: "dog", 2: "mouse"}
SIDE = {"height": 64, "width": 64}


def save_tiny_mask2former(folder: Path) -> Path:
    """Write a Mask2Former with a Swin backbone."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=6, id2label=LABELS, **small, **layers)
    model = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(model.class_predictor.weight, std=2)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size=SIDE, ignore_index=255).save_pretrained(folder)
    return folder


def save_tiny_yolos(folder: Path) -> Path:
    """Write a YOLOS, a detector with fixed classes."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = YolosConfig(image_size=(64, 64), patch_size=16, num_detection_tokens=6, id2label=LABELS, **sizes)
    model = YolosForObjectDetection(config)
    torch.nn.init.normal_(model.class_labels_classifier.layers[-1].weight, std=2)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def save_tiny_owlv2(folder: Path) -> Path:
    """Write an OWLv2, a zero-shot detector of CLIP's towers."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = len(vocabulary())
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0}
    config = Owlv2Config(
        text_config={**small, "vocab_size": words, "max_position_embeddings": 77, **ends},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    Owlv2Processor(image_processor=Owlv2ImageProcessorPil(size=SIDE), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_tiny_grounding_dino(folder: Path) -> Path:
    """Write a Grounding DINO, a zero-shot detector with BERT."""
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        SwinConfig,
    )
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog", "a"]
    stages = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}
    backbone = SwinConfig(image_size=64, embed_dim=8, window_size=4, **stages)
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    small = {"d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 2, "num_queries": 6}
    torch.manual_seed(0)
    config = GroundingDinoConfig(backbone_config=backbone, text_config=text, **small, **layers)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 160, "longest_edge": 320})
    GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder
