/**
 * Colour maps that grow evenly in lightness, from matplotlib's public-domain tables: 52 of their 256 colours,
 * between which colours are blended (no channel is further off than 4 of 255).
 */

const ANCHORS = {
  inferno:
    "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c59106e61136e69166e" +
    "71196e781c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557bf3952c63d4dcc4248d34743d94d3ddf5337" +
    "e45a31e9612bed6925f1711ff47918f78212f98b0bfa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156" +
    "f2ea69f2f27df5f992fcffa4",
  viridis:
    "44015446085c471063481769481d6f482475472a7a46307e453781433d844142873f48893d4e8a3a538b38598c355e8d" +
    "33638d31688e2e6d8e2c718e2a768e297b8e27808e25848e23898e218e8d20928c1f978b1e9c891fa18821a58524aa83" +
    "28ae802eb37c35b7793dbc7446c06f50c46a5ac86465cb5e70cf577cd25089d54895d840a2da37b0dd2fbddf26cae11f" +
    "d8e219e5e419f1e51dfde725",
  magma:
    "00000402020b0504160907200e0b2b140e361a104221114e29115a311165390f6e420f754a107952137c5a167e621980" +
    "6a1c81721f81792282812581892881912b81992d80a1307eaa337db2357bba3878c23b75ca3e72d2426fd9466be04c67" +
    "e75263ec5860f1605df4695cf7725cf97b5dfb8560fc8e64fd9869fea16efeaa74feb47bfebd82fec68afecf92fed89a" +
    "fde2a3fdebacfcf4b6fcfdbf",
  cividis:
    "00224e002656002a5f002d68003070083370163770203a6f273e6e2e416d34456c3a486c3f4c6c444f6c49536c4e566c" +
    "535a6d575d6d5c616e60646f656870696b716d6f727272747676767a7a787e7d788381798885788d8878928c78969077" +
    "9b9476a09875a59c74aaa073afa471b5a86fbaac6dbfb06bc4b468c9b965cfbd62d4c15fdac65bdfca57e5cf52ead34c" +
    "f0d846f6dd3ffce236fee838",
  gray:
    "0000000505050a0a0a0f0f0f1414141919191e1e1e2323232828282d2d2d3232323737373c3c3c4141414646464b4b4b" +
    "5050505555555a5a5a5f5f5f6464646969696e6e6e7373737878787d7d7d8282828787878c8c8c9191919696969b9b9b" +
    "a0a0a0a5a5a5aaaaaaafafafb4b4b4b9b9b9bebebec3c3c3c8c8c8cdcdcdd2d2d2d7d7d7dcdcdce1e1e1e6e6e6ebebeb" +
    "f0f0f0f5f5f5fafafaffffff",
};

export type ColourMap = keyof typeof ANCHORS;
export const COLOUR_MAPS = Object.keys(ANCHORS) as ColourMap[];

const tables = new Map<ColourMap, Uint8ClampedArray>();

/** The map's 256 colours, (256, 3). */
export function colourTable(name: ColourMap): Uint8ClampedArray {
  let table = tables.get(name);
  if (!table) {
    const anchors = ANCHORS[name];
    const n = anchors.length / 6;
    const channel = (anchor: number, c: number) =>
      parseInt(anchors.slice(anchor * 6 + c * 2, anchor * 6 + c * 2 + 2), 16);
    table = new Uint8ClampedArray(256 * 3);
    for (let i = 0; i < 256; i++) {
      const position = (i / 255) * (n - 1);
      const low = Math.min(Math.floor(position), n - 2);
      for (let c = 0; c < 3; c++) {
        const [a, b] = [channel(low, c), channel(low + 1, c)];
        table[i * 3 + c] = a + (b - a) * (position - low);
      }
    }
    tables.set(name, table);
  }
  return table;
}

/** The place of a value in a colour table, 0 to 255. */
export function colourIndex(value: number, end: number): number {
  return end > 0 ? Math.round(Math.min(Math.max(value / end, 0), 1) * 255) : 0;
}
