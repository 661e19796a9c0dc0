// The draws of PerImageStream in support/system/randomness.py, bit for bit. The SHA-256 of a text is
// the key of a Philox generator. Its bits become float32 normals as in NumPy.

const TWO_32 = 2 ** 32;

// SHA-256 (FIPS 180-4)

const PRIMES = [];
for (let n = 2; PRIMES.length < 64; n++) if (PRIMES.every(prime => n % prime)) PRIMES.push(n);
const first32BitsAfterThePoint = x => Math.floor((x % 1) * TWO_32);
const ROUND_CONSTANTS = PRIMES.map(prime => first32BitsAfterThePoint(Math.cbrt(prime)));
const FIRST_HASH = PRIMES.slice(0, 8).map(prime => first32BitsAfterThePoint(Math.sqrt(prime)));
const rotate = (x, by) => (x >>> by) | (x << (32 - by));

// The digest of a text, as 8 words of 32 bits.
function sha256(text) {
  const bytes = new TextEncoder().encode(text);
  const padded = new Uint8Array(Math.ceil((bytes.length + 9) / 64) * 64);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 4, 8 * bytes.length);
  const hash = Uint32Array.from(FIRST_HASH), w = new Uint32Array(64);
  for (let start = 0; start < padded.length; start += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getUint32(start + 4 * i);
    for (let i = 16; i < 64; i++) {
      const u = w[i - 15], v = w[i - 2];
      w[i] = w[i - 16] + (rotate(u, 7) ^ rotate(u, 18) ^ (u >>> 3))
        + w[i - 7] + (rotate(v, 17) ^ rotate(v, 19) ^ (v >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const sum1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const sum0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      const first = h + sum1 + ((e & f) ^ (~e & g)) + ROUND_CONSTANTS[i] + w[i];
      const second = sum0 + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => { hash[i] += word; });
  }
  return hash;
}

// Philox 4x64 with 10 rounds (Salmon and others, 2011)

// Numbers of 64 bits are two of 32, the low one first: BigInt would be ten times slower.
const MULTIPLIERS = [[0xE14C6C93, 0xD2E7470E], [0x95121157, 0xCA5A8263]];
const KEY_STEPS = [[0x7F4A7C15, 0x9E3779B9], [0x84CAA73B, 0xBB67AE85]];
const ROUNDS = 10;

// The high 32 bits of a product of two numbers of 32 bits; Math.imul gives the low ones.
function highProduct(a, b) {
  const low = a * (b & 0xFFFF);
  return Math.floor((a * (b >>> 16) + Math.floor(low / 65536)) / 65536);
}

class Philox {
  // The key is 4 words of 32 bits, the low one first.
  constructor(key) {
    this.key = key;
    this.block = 0;
    this.words = new Uint32Array(8);
    this.used = 8;
  }

  // The next 32 bits.
  next() {
    if (this.used === 8) this.fill();
    return this.words[this.used++];
  }

  // A number of float32 in [0, 1).
  nextShare() { return (this.next() >>> 8) / 2 ** 24; }

  fill() {
    const c = this.words, key = Uint32Array.from(this.key), products = new Uint32Array(8);
    c.fill(0);
    c[0] = ++this.block;
    for (let round = 0; round < ROUNDS; round++) {
      multiply(MULTIPLIERS[0], c[0], c[1], products, 0);
      multiply(MULTIPLIERS[1], c[4], c[5], products, 4);
      c[0] = products[6] ^ c[2] ^ key[0];
      c[1] = products[7] ^ c[3] ^ key[1];
      c[2] = products[4];
      c[3] = products[5];
      c[4] = products[2] ^ c[6] ^ key[2];
      c[5] = products[3] ^ c[7] ^ key[3];
      c[6] = products[0];
      c[7] = products[1];
      addTo(key, 0, KEY_STEPS[0]);
      addTo(key, 2, KEY_STEPS[1]);
    }
    this.used = 0;
  }
}

// Writes a times (low, high), 128 bits, into found[at], ..., found[at + 3].
function multiply(a, low, high, found, at) {
  const middle = highProduct(a[0], low)
    + (Math.imul(a[0], high) >>> 0) + (Math.imul(a[1], low) >>> 0);
  const upper = highProduct(a[0], high) + highProduct(a[1], low)
    + (Math.imul(a[1], high) >>> 0) + Math.floor(middle / TWO_32);
  found[at] = Math.imul(a[0], low);
  found[at + 1] = middle;
  found[at + 2] = upper;
  found[at + 3] = highProduct(a[1], high) + Math.floor(upper / TWO_32);
}

function addTo(words, at, more) {
  const low = words[at] + more[0];
  words[at] = low;
  words[at + 1] += more[1] + Math.floor(low / TWO_32);
}

// Labels and noise

// The generator of a seed, a whole number, for a purpose at a position.
function sourceOf(seed, purpose, ...position) {
  const digest = sha256([seed, purpose, ...position].join("/"));
  return new Philox([digest[3], digest[2], digest[1], digest[0]]);
}

// The class of a seed's image if none is asked for.
function drawLabel(seed, numClasses) {
  if (numClasses === 1) return 0;
  const source = sourceOf(seed, "sampling label", 0);
  // Multiply and shift (Lemire, 2019). Some low halves would favour classes: draw those again.
  const favoured = TWO_32 % numClasses;
  let low, high;
  do {
    const bits = source.next();
    low = Math.imul(bits, numClasses) >>> 0;
    high = highProduct(bits, numClasses);
  } while (low < favoured);
  return high;
}

// The noise of a seed's image for a step: `count` normals.
function drawNoise(seed, step, count) {
  const source = sourceOf(seed, "sampling noise", 0, step);
  return Float32Array.from({length: count}, () => drawNormal(source));
}

// The ziggurat (Marsaglia and Tsang, 2000) covers the half bell exp(-x^2 / 2) by layers of equal
// area. One draw gives a layer, a sign and a place in the layer. Nearly all places are under the
// curve.

const LAYERS = 256, PLACES = 2 ** 23;
const TAIL_START = 3.6541528853610088;  // the lowest of 256 layers ends here and has the tail beyond
const LAYER_AREA = 0.004928673233974658;
const ziggurat = layers();

// Per layer, the lowest first and then from the top: `width` of a place; `inside`, the number of
// places that are surely under the curve; `height` of the curve at the layer's end.
function layers() {
  const bell = x => Math.exp(-x * x / 2);
  const ends = [TAIL_START];  // of the layers, from below
  while (ends.length < LAYERS - 1) {
    const end = ends.at(-1);
    ends.push(Math.sqrt(-2 * Math.log(LAYER_AREA / end + bell(end))));
  }
  ends.reverse();
  const lowest = LAYER_AREA / bell(TAIL_START);  // the width of a rectangle of this area
  const shares = [TAIL_START / lowest, 0, ...ends.slice(1).map((end, i) => ends[i] / end)];
  return {
    width: [lowest, ...ends].map(end => Math.fround(end / PLACES)),
    inside: shares.map(share => Math.floor(share * PLACES)),
    height: [1, ...ends.map(end => Math.fround(bell(end)))],
  };
}

function drawNormal(source) {
  const {width, inside, height} = ziggurat;
  for (;;) {
    const bits = source.next();
    const layer = bits & 0xFF, isNegative = bits & 0x100, place = bits >>> 9;
    const x = Math.fround(place * width[layer]);
    if (place < inside[layer]) return isNegative ? -x : x;
    if (layer === 0) {
      // The tail takes its sign from another bit.
      const beyond = drawTail(source);
      return place & 0x100 ? -beyond : beyond;
    }
    const share = source.nextShare();
    const level = height[layer] + (height[layer - 1] - height[layer]) * share;
    if (level < Math.exp(-x * x / 2)) return isNegative ? -x : x;
  }
}

// Every operation is in float32, as in NumPy.
function drawTail(source) {
  const start = Math.fround(TAIL_START);
  const drawExponential = () => -Math.fround(Math.log1p(-source.nextShare()));
  for (;;) {
    const x = Math.fround(Math.fround(1 / start) * drawExponential()), y = drawExponential();
    if (2 * y > x * x) return Math.fround(start + x);
  }
}
