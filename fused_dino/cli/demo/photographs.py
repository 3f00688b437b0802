"""The demo's own photographs: the file in an installed package, the author, and captions written for the demo.

The text head is trained on `learn`. `held_out` says the same things in sentences that it never sees, so that
only the meaning of the words can carry over.
"""

from dataclasses import dataclass

CC0 = "CC0 1.0"
CC_BY = "CC BY 2.0"
LICENCE_URLS = {
    CC0: "https://creativecommons.org/publicdomain/zero/1.0/",
    CC_BY: "https://creativecommons.org/licenses/by/2.0/",
}
PROJECTS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Entry:
    """One photograph: `file` is a path inside the installed package `package`."""

    name: str
    package: str
    file: str
    credit: str
    licence: str
    source: str
    learn: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def project(self) -> str:
        """The name of the package in an index."""
        return PROJECTS[self.package]

    @property
    def licence_url(self) -> str | None:
        return LICENCE_URLS.get(self.licence)


PHOTOGRAPHS = (
    Entry(
        name="astronaut",
        package="skimage",
        file="data/astronaut.png",
        credit="Eileen Collins, NASA Great Images",
        licence="no known copyright restrictions, public domain",
        source="https://flic.kr/p/r9qvLn",
        learn=(
            "a smiling astronaut in an orange space suit",
            "portrait of a woman astronaut with short blond hair",
            "an astronaut sits beside a flag with her white helmet",
            "a woman in a bright orange pressure suit and her helmet",
            "official portrait of a pilot with a model of the space shuttle behind her",
            "a smiling pilot wearing a suit covered in patches",
        ),
        held_out=(
            "a woman pilot in an orange suit with a shuttle model behind her",
            "official portrait of a smiling astronaut and her helmet",
        ),
    ),
    Entry(
        name="cat",
        package="skimage",
        file="data/chelsea.png",
        credit="Chelsea the cat, Stéfan van der Walt",
        licence=CC0,
        source="https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.chelsea",
        learn=(
            "a close view of a tabby cat with green eyes",
            "the striped face of a cat looking to the side",
            "a ginger tabby with long white whiskers",
            "soft striped fur, whiskers and a pink nose",
            "a calm pet cat with pointed ears",
            "green eyes and whiskers of a calm tabby",
        ),
        held_out=(
            "a striped cat with a pink nose and white whiskers",
            "the soft face of a ginger tabby, green eyes looking to the side",
        ),
    ),
    Entry(
        name="coffee",
        package="skimage",
        file="data/coffee.png",
        credit="Coffee at Pikolo Espresso Bar, Rachel Michetti",
        licence=CC0,
        source="https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.coffee",
        learn=(
            "a cup of espresso on a wooden table",
            "a red saucer with a small spoon beside the coffee",
            "fresh coffee in a red porcelain cup",
            "hot espresso served at a coffee bar",
            "a shiny metal spoon rests on a saucer",
            "brown wood grain under a cup and saucer",
        ),
        held_out=(
            "hot coffee in a porcelain cup, served with a metal spoon",
            "an espresso cup and saucer on brown wood",
        ),
    ),
    Entry(
        name="galaxies",
        package="skimage",
        file="data/hubble_deep_field.jpg",
        credit="Hubble eXtreme Deep Field, NASA",
        licence="public domain (NASA media guidelines)",
        source="http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        learn=(
            "thousands of distant galaxies in deep space",
            "a telescope picture of the dark universe",
            "spiral galaxies scattered over black space",
            "tiny stars and galaxies seen by the hubble telescope",
            "the deep field, a view of the early universe",
            "countless stars and points of light in the dark",
        ),
        held_out=(
            "a hubble view of distant galaxies in the dark universe",
            "countless tiny spiral galaxies in deep black space",
        ),
    ),
    Entry(
        name="tissue",
        package="skimage",
        file="data/ihc.png",
        credit="Stained colon glands, Center for Microscopy and Molecular Imaging (CMMI)",
        licence="no known copyright restrictions",
        source="https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.immunohistochemistry",
        learn=(
            "brown stained tissue under a microscope",
            "a microscope slide with blue cell nuclei",
            "colon glands coloured by an antibody stain",
            "a thin section of tissue with brown glands",
            "blue and brown cells in a pathology slide",
            "stained cells of the colon at high magnification",
        ),
        held_out=(
            "a pathology slide of colon tissue with blue nuclei",
            "brown glands and stained cells under a microscope",
        ),
    ),
    Entry(
        name="retina",
        package="skimage",
        file="data/retina.jpg",
        credit="Fundus photograph of a normal left eye, Mikael Häggström",
        licence=CC0,
        source="https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
        learn=(
            "the back of a human eye with red blood vessels",
            "a fundus photograph of the retina",
            "thin blood vessels branching across a retina",
            "an eye examination showing the optic disc",
            "a round medical image of the inner eye",
            "the bright optic nerve and the macula of a human eye",
        ),
        held_out=(
            "the optic nerve and the branching blood vessels",
            "a medical fundus image of a human retina",
        ),
    ),
    Entry(
        name="rocket",
        package="skimage",
        file="data/rocket.jpg",
        credit="DSCOVR on Falcon 9 before its launch, SpaceX",
        licence="released into the public domain by SpaceX",
        source="https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
        learn=(
            "a tall rocket on the launch pad at dusk",
            "a rocket stands between towers before the launch",
            "floodlights shine around the launch pad at night",
            "steel lattice towers against a blue evening sky",
            "a tall falcon rocket waits for liftoff",
            "bright floodlights and lattice towers at dusk",
        ),
        held_out=(
            "floodlights shine on a tall rocket at night",
            "lattice towers around the launch pad under an evening sky",
        ),
    ),
    Entry(
        name="temple",
        package="sklearn",
        file="datasets/images/china.jpg",
        credit="danielbuechele on Flickr",
        licence=CC_BY,
        source="https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
        learn=(
            "a chinese pagoda above the trees",
            "a temple with curved roofs beside a lake",
            "a painted wooden tower overlooking the water",
            "an ornate palace roof with glazed tiles",
            "a wide lake and a hazy shore behind a temple",
            "old chinese architecture surrounded by trees",
        ),
        held_out=(
            "an old temple tower with ornate curved roofs",
            "trees around a chinese palace beside the lake",
        ),
    ),
    Entry(
        name="dahlia",
        package="sklearn",
        file="datasets/images/flower.jpg",
        # scikit-learn's README repeats the other photographer's name here, but both of its links lead to vultilion.
        credit="vultilion on Flickr",
        licence=CC_BY,
        source="https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
        learn=(
            "a peach dahlia in full bloom",
            "a round flower with many layered petals",
            "a garden blossom against dark green leaves",
            "peach coloured petals in a spiral",
            "a single dahlia on a blurred background of leaves",
            "a bright flower opening in the garden",
        ),
        held_out=(
            "layered petals of a single peach dahlia",
            "a garden flower in full bloom before dark green leaves",
        ),
    ),
)
