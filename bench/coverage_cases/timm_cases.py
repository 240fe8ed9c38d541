"""Networks of timm, at least one of each family: the smallest one, at the smallest image that it accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .case import COUPLED, RANDOM, Case, Made, images

KIND = "timm"

# By the size of their images.
PLAIN = {
    32: """
        caformer_s18 convformer_s18 convmixer_768_32 convnext_atto_ols convnext_tiny_hnf convnext_zepto_rms
        convnextv2_atto cpubone_b1_dwnorm cpubone_nano crossvit_9_dagger_240 crossvit_tiny_240 cs3darknet_focus_s
        cs3darknet_s cs3sedarknet_xdw cspnext_tiny cspresnext50 darknet17 davit_tiny densenet121 densenetblur121d dla34
        dla46x_c dla60_res2net dpn48b eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientnet_b0_gn efficientnet_es
        efficientnet_lite0 efficientvim_m1 efficientvim_m1_dist efficientvit_b0 ese_vovnet19b_dw ese_vovnet19b_slim_dw
        fasternet_t0 fastvit_mci0 fastvit_sa12 fastvit_t8 fbnetc_100 focalnet_tiny_srf ghostnet_050 hardcorenas_b
        hgnet_tiny hgnetv2_b0 hieradet_small hrnet_w18_small hrnet_w18_small_v2 iformer_t inception_next_atto lcnet_035
        lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception lowformer_b0 mixnet_s mnasnet_small
        mobilenet_edgetpu_100 mobilenetv2_035 mobilenetv5_base mobilenetv3_small_050 mobilenetv4_conv_small_035
        mobilenetv4_hybrid_medium
        nasnetalarge nextvit_small nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 pnasnet5large poolformer_s12
        poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 res2net50_14w_8s
        res2next50 resnest14d resnest26d resnet10t resnet18d resnet50_gn resnetaa50 resnetblur18 resnetrs50 resnetv2_18
        resnetv2_50d_evos resnetv2_50d_gn resnetv2_50x1_bit rexnet_100 rexnetr_100 sam2_hiera_tiny selecsls42 selecsls60
        semnasnet_050 seresnet18 shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 starnet_s1
        test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_evos test_efficientnet_gn
        test_efficientnet_ln test_mambaout test_nfnet test_resnet tf_efficientnet_cc_b0_4e tf_efficientnetv2_b0
        tiny_vit_5m_224 tinynet_e tresnet_m vovnet39a xception41 xception41p
    """,
    64: """
        csatv2 ghostnetv2_100 ghostnetv3_050
    """,
    96: """
        inception_resnet_v2 inception_v3 inception_v4
    """,
}
# Those that are built for a size of image.
SIZED = {
    32: """
        botnet26t_256 cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_nano_cc_224 coatnext_nano_rw_224 convit_tiny
        deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 eca_botnext26ts_256
        efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcresnext26ts gcvit_xxtiny gernet_s gmixer_12_224
        gmlp_ti16_224 hiera_small_abswin_256 hiera_tiny_224 lambda_resnet26rpt_256 lambda_resnet26t levit_128s
        levit_conv_128s maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxxvitv2_nano_rw_256 mixer_s32_224 mobileone_s1
        mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny pit_ti_224 pit_ti_distilled_224 regnetz_b16 regnetz_b16_evos
        repvgg_a0 repvit_m1 resmlp_12_224 resnext26ts sebotnet33ts_256 sequencer2d_s swiftformer_xs swin_s3_tiny_224
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window16_256 test_byobnet test_coatnet test_maxvit
        test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos tnt_s_legacy_patch16_224 tnt_s_patch16_224
        twins_pcpvt_small twins_svt_small visformer_tiny vit_dlittle_patch16_reg1_gap_256
        vit_little_patch16_reg4_gap_256 vit_pe_core_tiny_patch16_384 vit_pwee_patch16_reg1_gap_256
        vit_relpos_small_patch16_224 vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224
        vit_small_patch32_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
        vit_tiny_r_s16_p8_224 vit_wee_patch16_reg1_gap_256 vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224
        xcit_tiny_12_p16_224
    """,
    128: """
        halo2botnet50ts_256 lamhalobotnet50ts_256
    """,
    224: """
        efficientformer_l1 haloregnetz_b
    """,
    256: """
        bat_resnext26ts eca_halonext26ts halonet_h1
    """,
}
# Those of which the first blocks are enough.
SHORTENED = {
    "aimv2_large_patch14_224": (32, {"depth": 1}),
    "beit_base_patch16_224": (32, {"depth": 2}),
    "deepseek_vit_412m": (224, {"depth": 1}),
    "gemma4_vit_167m_enc": (96, {"depth": 2}),
    "naflexvit_base_patch16_gap": (32, {"depth": 2}),
    "qwen3_vit_88m": (32, {"depth": 2}),
    "samvit_base_patch16_224": (32, {"depth": 3}),
    "vit_base_mci_224": (32, {"depth": 2}),
    "vit_base_patch16_siglip_224": (32, {"depth": 2}),
}


def build(name: str, size: int, options: dict[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=5, **options), images(size)

    return make


CASES = [
    *(Case(KIND, name, build(name, size, {})) for size, names in PLAIN.items() for name in names.split()),
    *(
        Case(KIND, name, build(name, size, {"img_size": size}))
        for size, names in SIZED.items()
        for name in names.split()
    ),
    *(
        Case(KIND, name, build(name, size, {"img_size": size, **options}))
        for name, (size, options) in SHORTENED.items()
    ),
]
# In training mode.
CASES += [
    Case(KIND, "test_vit, training without dropout", build("test_vit", 32, {"img_size": 32}), train=True),
    Case(
        KIND,
        "test_vit, training with drop path",
        build("test_vit", 32, {"img_size": 32, "drop_path_rate": 0.1}),
        "branches are left out at random",
        message=RANDOM,
        train=True,
    ),
    Case(
        KIND,
        "test_vit, training with dropout",
        build("test_vit", 32, {"img_size": 32, "proj_drop_rate": 0.1}),
        "the network is random",
        message=RANDOM,
        train=True,
    ),
    Case(
        KIND,
        "test_efficientnet, training",
        build("test_efficientnet", 32, {}),
        "its batch norms take the statistics of the batch",
        message=COUPLED,
        train=True,
    ),
]
CASES.sort(key=lambda case: case.name)
