// From noise to pixels: the samplers of sampler.py over the exported graph, f(noise, t, s).
// B images, each of `model.shape`: [C, H, W]; arrays are Float32Array [B, C, H, W].

const MAX_CACHED_VALUES = 4e6;  // of noise, 4 bytes each

class Engine {
  // `model` is the description that page.py writes into the page.
  constructor(ort, session, model) {
    Object.assign(this, {ort, session, model});
    this.imageSize = model.shape.reduce((a, b) => a * b);
    this.cache = new Map();
  }

  static async create(ort, wasm, graph, model) {
    Object.assign(ort.env.wasm, {wasmBinary: wasm, numThreads: 1, proxy: false});
    return new Engine(ort, await ort.InferenceSession.create(graph), model);
  }

  noiseOf(seed, step) {
    const name = `${seed}/${step}`;
    let noise = this.cache.get(name);
    if (!noise) {
      noise = drawNoise(seed, step, this.imageSize);
      if ((this.cache.size + 1) * this.imageSize > MAX_CACHED_VALUES) this.cache.clear();
      this.cache.set(name, noise);
    }
    return noise;
  }

  // The class of a seed's image: `label`, or the one that the seed draws if that is null.
  labelOf(seed, label) {
    if (!this.model.isConditional) return null;
    return label ?? drawLabel(seed, this.model.numClasses);
  }

  // x_s of x_t. All images have the same t, and each has its own s.
  async step(x, t, s, labels) {
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

  // The noise, then x after each step. `noises(step)` is [B, C, H, W].
  async run(noises, labels, steps, sampler) {
    const {times, alpha, beta} = this.model.steps[steps], found = [noises(0)];
    for (let step = 0; step < steps; step++) {
      let x = found[step];
      if (sampler === "renoise" && step > 0) {
        const noise = noises(step);
        x = x.map((value, i) => alpha[step] * value + beta[step] * noise[i]);
      }
      const end = sampler === "renoise" ? 0 : times[step + 1];
      found.push(await this.step(x, times[step], labels.map(() => end), labels));
    }
    return found;
  }

  // The noise of images {seed}, or {seed, to, share}: on the sphere between two seeds' noises.
  noises(images, step) {
    const all = new Float32Array(images.length * this.imageSize);
    images.forEach(({seed, to, share}, i) => {
      const own = this.noiseOf(seed, step);
      const noise = share ? slerp(own, this.noiseOf(to, step), share) : own;
      all.set(noise, i * this.imageSize);
    });
    return all;
  }

  // The images as RGBA, one after the other, their classes, and the milliseconds for all of them.
  async draw({images, label, steps, sampler}) {
    const labels = images.map(({seed}) => this.labelOf(seed, label));
    const start = performance.now();
    const found = await this.run(step => this.noises(images, step), labels, steps, sampler);
    const milliseconds = performance.now() - start;
    return {pixels: this.pixelsOf(found.at(-1)), labels, milliseconds};
  }

  // From a seed's noise to its image: x after each step, and f(noise, 1, s) for each s of `times`.
  async follow({seed, label, steps, sampler, times}) {
    const own = this.labelOf(seed, label);
    const found = await this.run(step => this.noiseOf(seed, step), [own], steps, sampler);
    const start = this.noises(times.map(() => ({seed})), 0);
    const along = await this.step(start, 1, times, times.map(() => own));
    return {after: found.map(x => this.pixelsOf(x)), along: this.pixelsOf(along), label: own};
  }

  // RGBA of x in -1..1, as to_pixels in support/data/images.py makes it.
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

// The noise at `share` of the angle from a to b.
function slerp(a, b, share) {
  let product = 0, squareA = 0, squareB = 0;
  for (let i = 0; i < a.length; i++) {
    product += a[i] * b[i];
    squareA += a[i] ** 2;
    squareB += b[i] ** 2;
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, product / Math.sqrt(squareA * squareB))));
  if (Math.sin(angle) < 1e-6) return a;  // the same noise
  const ofA = Math.sin((1 - share) * angle) / Math.sin(angle);
  const ofB = Math.sin(share * angle) / Math.sin(angle);
  return a.map((value, i) => ofA * value + ofB * b[i]);
}
