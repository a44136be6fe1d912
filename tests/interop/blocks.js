// Scales of blocks of 128 values, which int8 and the uniform encodings share.

export const exponentOf = (magnitude) => {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, magnitude);
  return ((view.getUint32(0) >>> 20) & 0x7ff) - 1023;
};

export const BLOCK = 128;
export const SMALLEST = 2 ** -126;

// The smallest number of 17 significant bits that is at least `value`.
function upTo17Bits(value) {
  const step = 2 ** (exponentOf(value) - 16);
  return Math.ceil(value / step) * step;
}

export function scalesOf(values, levels) {
  const largest = Math.floor((2 ** 24 - 1) / levels / 2 ** (exponentOf((2 ** 24 - 1) / levels) - 16));
  const most = largest * 2 ** (exponentOf((2 ** 24 - 1) / levels) - 16) * 2 ** 104;
  return Array.from({ length: Math.ceil(values.length / BLOCK) }, (_, i) => {
    const peak = values.slice(i * BLOCK, (i + 1) * BLOCK).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    return Math.min(Math.max(peak / levels <= SMALLEST ? SMALLEST : upTo17Bits(peak / levels), SMALLEST), most);
  });
}

export function readScales(data, n, levels) {
  return Array.from({ length: Math.ceil(n / BLOCK) }, (_, i) => {
    const scale = data.readFloatLE(4 * i);
    const fits = scale >= SMALLEST && Number.isFinite(Math.fround(levels * scale)) && upTo17Bits(scale) === scale;
    if (!fits) throw new Error(`scale ${i} is ${scale}`);
    return scale;
  });
}
