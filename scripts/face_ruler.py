# Needs: pip install --no-deps dlib-bin face-recognition-models. n=600 takes 10 to 30 minutes.
"""A ruler that knows faces: dlib's face detector, and a network's 128 numbers for each face.

    python scripts/face_ruler.py IMAGES faces.zip [n [n_training]]   # to results/face_ruler.json

Of n images of a folder, a zip or a run: `found`, the share with a face, and of these `measure`.
Held-out faces often show persons of the n_training training faces, samples should not.
"""

import importlib.util  # not to import face_recognition_models, which needs pkg_resources
import io
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402


def load_images(path, n):
    if any(Path(path).glob("run.pt*")):
        return cs.sample(cs.load_run(path), n)
    files = cs.Faces(path, 16)
    first = Image.open(io.BytesIO(files.read(files.names[0])))
    images = cs.Faces(path, min(first.size))
    return torch.stack([images[i] for i in cs.pick(torch.arange(len(images)), n)])


def describe(images):
    """Descriptors (M, 128) of the M images with a face, kept under a hash of the images."""
    cache = ROOT / f"results/latest/face_ruler/{cs.content_hash(images.numpy())}.pt"
    if cache.exists():
        return torch.load(cache)
    import dlib  # here: the numbers are tested without it

    models = Path(importlib.util.find_spec("face_recognition_models").origin).with_name("models")
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(f"{models}/shape_predictor_5_face_landmarks.dat")
    network = dlib.face_recognition_model_v1(f"{models}/dlib_face_recognition_resnet_model_v1.dat")
    rows = []
    for image in tqdm(images.permute(0, 2, 3, 1).contiguous().numpy(), "faces"):  #        (S, S, 3)
        for box in detector(image, 1)[:1]:  # in the image enlarged once; the surest comes first
            rows.append(list(network.compute_face_descriptor(image, predictor(image, box))))
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.tensor(rows, dtype=torch.float64), cache)
    return torch.load(cache)


def measure(faces, real, training):
    """Frechet distance to real ones x1e3, lower is better; mean distance to the nearest other one,
    lower: they repeat; share nearer than 0.4 to training ones (below 0.6: called one person)."""
    cov_faces, cov_real = faces.T.cov(), real.T.cov()  #                             (128, 128) each
    roots = torch.linalg.eigvals(cov_faces @ cov_real).real.clamp(min=0).sqrt()  #            (128,)
    shift = (faces.mean(0) - real.mean(0)).square().sum()
    frechet = shift + (cov_faces + cov_real).trace() - 2 * roots.sum()
    return {
        "frechet": 1e3 * frechet.item(),
        "nearest_other": torch.cdist(faces, faces).kthvalue(2).values.mean().item(),  # 1: itself
        "near_training": (torch.cdist(faces, training).amin(1) < 0.4).double().mean().item(),
    }


def main(path, source, n=600, n_training=3000):
    images = load_images(path, n)
    training, held_out = cs.load_faces(source, images.shape[-1])
    n_training = min(n_training, len(training))
    sets = {
        "fake": images,
        "held_out": cs.pick(held_out, n),
        "training": cs.pick(training, n_training),
    }
    found = {name: describe(images) for name, images in sets.items()}
    record = {name: {"found": len(found[name]) / len(sets[name])} for name in sets}
    fake, real, training = found.values()
    if len(fake) > 1:
        real = real[: len(fake)]  # as many: fewer faces are farther from each other
        record["fake"] |= measure(fake, real, training)
        record["held_out"] |= measure(real, cs.pick(training, len(real)), training)
    print(json.dumps(record, indent=1))
    record.update(n=n, n_training=n_training, image_size=images.shape[-1])
    record.update(images=path, data=Path(source).name)
    record["date"] = time.strftime("%Y-%m-%d")
    file = ROOT / "results/face_ruler.json"
    filed = json.loads(file.read_text())
    filed[f"{Path(path).resolve().name} {images.shape[-1]}"] = record
    file.write_text(json.dumps(filed, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
