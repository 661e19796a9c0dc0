// From noise to pixels: sampling.py's samplers over the exported graph, f(noise, t, s).
// B images, each of `model.shape`: [C, H, W]; arrays are Float32Array [B, C, H, W].

const MOST_CACHED_VALUES = 4e6;  // of noise, 4 bytes each

class Engine {
  // `model` is the page's description of it, as support/page/assembly.py writes that.
  constructor(ort, session, model) {
    Object.assign(this, {ort, session, model});
    this.imageSize = model.shape.reduce((a, b) => a * b);
    this.cache = new Map();
  }

  static async create(ort, wasm, graph, model) {
    Object.assign(ort.env.wasm, {wasmBinary: wasm, numThreads: 1, proxy: false});
    return new Engine(ort, await ort.InferenceSession.create(graph), model);
  }

  noiseOf(seed, jump) {
    const name = `${seed}/${jump}`;
    let noise = this.cache.get(name);
    if (!noise) {
      noise = drawNoise(seed, jump, this.imageSize, this.model.ziggurat);
      if ((this.cache.size + 1) * this.imageSize > MOST_CACHED_VALUES) this.cache.clear();
      this.cache.set(name, noise);
    }
    return noise;
  }

  // The class of a seed's image: `label`, or where that is null one that the seed draws.
  labelOf(seed, label) {
    if (!this.model.isConditional) return null;
    return label ?? drawLabel(seed, this.model.numClasses);
  }

  // x_s of x_t; t is that of all images, s has one for each.
  async jump(x, t, s, labels) {
    const {Tensor} = this.ort, count = labels.length;
    const given = {
      noise: new Tensor("float32", x, [count, ...this.model.shape]),
      t: new Tensor("float32", new Float32Array(count).fill(t), [count]),
      s: new Tensor("float32", Float32Array.from(s), [count]),
    };
    if (this.model.isConditional) {
      given.label = new Tensor("int64", BigInt64Array.from(labels, BigInt), [count]);
    }
    return (await this.session.run(given)).x_s.data;
  }

  // x after each jump, the noise first. `noises(jump)` is [B, C, H, W].
  async jumps(noises, labels, steps, sampler) {
    const {times, alpha, beta} = this.model.steps[steps], found = [noises(0)];
    for (let jump = 0; jump < steps; jump++) {
      let x = found[jump];
      if (sampler === "renoise" && jump > 0) {
        const noise = noises(jump);
        x = x.map((value, i) => alpha[jump] * value + beta[jump] * noise[i]);
      }
      const end = sampler === "renoise" ? 0 : times[jump + 1];
      found.push(await this.jump(x, times[jump], labels.map(() => end), labels));
    }
    return found;
  }

  // The noise of images {seed}, or {seed, to, share}: between two seeds' along the sphere.
  noises(images, jump) {
    const all = new Float32Array(images.length * this.imageSize);
    images.forEach(({seed, to, share}, i) => {
      const own = this.noiseOf(seed, jump);
      const noise = share ? slerp(own, this.noiseOf(to, jump), share) : own;
      all.set(noise, i * this.imageSize);
    });
    return all;
  }

  // Images as RGBA, one after the other, their classes, and the milliseconds that all took.
  async draw({images, label, steps, sampler}) {
    const labels = images.map(({seed}) => this.labelOf(seed, label));
    const start = performance.now();
    const found = await this.jumps(jump => this.noises(images, jump), labels, steps, sampler);
    const milliseconds = performance.now() - start;
    return {pixels: this.pixelsOf(found.at(-1)), labels, milliseconds};
  }

  // How the image of a seed comes about: x after each jump, and f(noise, 1, s) at each s of `path`.
  async follow({seed, label, steps, sampler, path}) {
    const own = this.labelOf(seed, label);
    const found = await this.jumps(jump => this.noiseOf(seed, jump), [own], steps, sampler);
    const start = this.noises(path.map(() => ({seed})), 0);
    const along = await this.jump(start, 1, path, path.map(() => own));
    return {jumps: found.map(x => this.pixelsOf(x)), path: this.pixelsOf(along), label: own};
  }

  // RGBA of x in -1..1, by to_pixels of support/data/images.py.
  pixelsOf(x) {
    const [channels, height, width] = this.model.shape, area = height * width;
    const found = new Uint8ClampedArray(4 * x.length / channels).fill(255);
    for (let image = 0; image < x.length / this.imageSize; image++) {
      for (let i = 0; i < area; i++) {
        for (let c = 0; c < 3; c++) {
          const value = x[image * this.imageSize + (channels === 1 ? 0 : c * area) + i];
          const scaled = Math.fround(Math.fround(value * 127.5) + 128);
          found[4 * (image * area + i) + c] = Math.floor(Math.min(Math.max(scaled, 0), 255));
        }
      }
    }
    return found;
  }
}

// Between two noises, at `share` of the angle from a to b.
function slerp(a, b, share) {
  let product = 0, squareA = 0, squareB = 0;
  for (let i = 0; i < a.length; i++) {
    product += a[i] * b[i];
    squareA += a[i] ** 2;
    squareB += b[i] ** 2;
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, product / Math.sqrt(squareA * squareB))));
  if (Math.sin(angle) < 1e-6) return a;  // one and the same noise
  const ofA = Math.sin((1 - share) * angle) / Math.sin(angle);
  const ofB = Math.sin(share * angle) / Math.sin(angle);
  return a.map((value, i) => ofA * value + ofB * b[i]);
}
